"""What the methods of unlearning share."""
