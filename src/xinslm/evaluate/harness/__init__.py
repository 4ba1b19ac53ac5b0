"""lm-evaluation-harness: its tasks and its scores, with our models and our scorer behind it."""
