"""The commands of compress-model, one module each, imported only when run."""
