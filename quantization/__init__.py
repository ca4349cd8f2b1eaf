"""Low-bit quantization: one file a method, and the packed formats."""
