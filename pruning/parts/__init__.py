"""Building blocks that the pruning methods share."""
