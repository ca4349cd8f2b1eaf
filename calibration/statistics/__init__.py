"""Statistics of activations, gradients and losses on calibration text."""
