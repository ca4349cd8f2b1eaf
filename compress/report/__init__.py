"""Scorecards, their comparison, and how both are shown."""
