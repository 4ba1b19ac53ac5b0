"""Texts to learn from that the teacher or the student writes."""
