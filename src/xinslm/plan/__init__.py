"""What a training run will need, by formulas, before anything starts."""
