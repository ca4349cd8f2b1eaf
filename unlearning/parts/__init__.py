"""What several methods of unlearning are made of."""
