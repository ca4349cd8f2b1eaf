"""Whether a model has forgotten, and whether it stays so after every later step."""
