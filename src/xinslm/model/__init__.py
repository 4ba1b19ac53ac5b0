"""The student model: its configuration, its files, and the transformer."""
