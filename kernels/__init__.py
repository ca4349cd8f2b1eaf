"""Low-bit operators: one schema, several backends."""
