"""Losses, the teacher cache, and the one training loop."""
