"""Training: the one loop, optimizers, checkpoints, logs, LoRA."""
