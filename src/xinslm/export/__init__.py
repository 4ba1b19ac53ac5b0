"""Formats of other people's runtimes, one file each."""
