"""Where text comes from, and how it becomes windows of tokens."""
