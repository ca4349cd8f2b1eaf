"""Training-free structured pruning. Each file is a method; what they share lies in ``parts``."""
