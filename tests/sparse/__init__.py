"""Masks, calibration, packed deltas, the sparse optimiser and sensitivity, against independent references."""
