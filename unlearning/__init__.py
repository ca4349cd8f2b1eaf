"""Unlearning: one file a method."""
