"""A model in motion: built without memory, filled and walked layer by layer."""
