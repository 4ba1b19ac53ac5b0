"""Reads raw corpora, writes datasets of tokens, and packs them into batches of fixed shape."""
