"""Distillation: teacher targets and hidden-state losses for the training loop."""
