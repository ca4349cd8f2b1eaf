"""The harness: lm-eval asks a model questions, and each answer keeps its score."""
