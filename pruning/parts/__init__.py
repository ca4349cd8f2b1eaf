"""What pruning methods are made of."""
