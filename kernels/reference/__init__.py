"""The operators in plain torch, for every device."""
