"""Merge, inspect and search: one server step over checkpoints."""
