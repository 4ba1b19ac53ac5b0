"""The student: its shape, its weights on disk, the transformer itself."""
