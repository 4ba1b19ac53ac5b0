"""Checks of the user's own data, teacher, cache and student before a long run."""
