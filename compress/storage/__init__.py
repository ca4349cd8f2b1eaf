"""A model at rest: checkpoints, adapters, lineage and the formats of low-bit weights."""
