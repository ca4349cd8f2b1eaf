"""How low-bit weights are stored, and which other programs load them."""
