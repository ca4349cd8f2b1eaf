"""Where calibration and evaluation text comes from."""
