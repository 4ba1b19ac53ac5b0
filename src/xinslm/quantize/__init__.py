"""4-bit and 8-bit weights: the grids, GPTQ, and the canonical folder that exports are made from."""
