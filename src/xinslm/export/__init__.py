"""Exports to other runtimes, one file each."""
