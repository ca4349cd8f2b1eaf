"""Training-free structured pruning: one file a method."""
