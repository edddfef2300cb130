"""Studies of one-shot federated learning: what merges of fine-tunes do, over draws, subsets and seeds."""
