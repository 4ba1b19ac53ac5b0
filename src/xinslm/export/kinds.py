"""Kinds of exported folders by their manifests, and the name of the model card."""

EXPORT = "export"
"""One format: `export hf`, `export mlx`."""
EXPORTS = "exports"
"""A GGUF file and its companions, next to folders of the other kind: `export all`."""
CARD = "README.md"
