"""Teacher adapters, one a file."""
