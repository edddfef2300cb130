"""Lazy tensors, aggregates of deltas, and one step by them, block by block. Knows no file and no model."""
