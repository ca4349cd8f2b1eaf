"""Text for calibration and evaluation, and statistics that are taken on it."""
