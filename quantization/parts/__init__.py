"""What quantization methods are made of."""
