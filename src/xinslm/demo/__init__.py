"""The whole pipeline on built-in data, and the generator of that data."""
