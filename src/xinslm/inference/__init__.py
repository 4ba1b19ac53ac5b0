"""Text from a model: sampling, streaming, chat, behind one `Engine` interface."""
