"""Modules over low-bit weights."""
