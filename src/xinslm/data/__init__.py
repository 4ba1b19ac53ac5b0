"""Raw corpora in, datasets of tokens out, and the fixed-shape batches that are made of them."""
