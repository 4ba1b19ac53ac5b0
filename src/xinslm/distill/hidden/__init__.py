"""Losses on hidden states: matching, contrast, and the sketches that keep a teacher's states."""
