"""Lazy tensors, aggregates of deltas, one step by them, block by block; no file and no model."""
