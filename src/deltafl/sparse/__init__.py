"""Sensitivity, masks, and training and sending the kept coordinates only."""
