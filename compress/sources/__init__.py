"""Where models come from: the demo model, folders on this machine and the Hugging Face hub."""
