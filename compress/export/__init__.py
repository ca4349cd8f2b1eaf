"""Export: models in the formats that other programs load, one file for each format."""
