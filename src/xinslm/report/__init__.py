"""A run folder turned into one readable page."""
