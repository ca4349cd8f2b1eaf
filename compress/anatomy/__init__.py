"""Architectures as data: where the parts of a transformer are."""
