"""How well a model predicts text: bits per byte and perplexity."""
