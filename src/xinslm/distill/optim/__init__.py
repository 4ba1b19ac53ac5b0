"""Optimisers: AdamW, 8-bit AdamW, Muon; stochastic rounding, steps inside the backward pass."""
