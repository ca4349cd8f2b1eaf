"""Low-bit numbers: how weights become codes, and how codes are packed."""
