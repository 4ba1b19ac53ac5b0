"""A short text that tokenizers disagree on: letters of several scripts, digits, white space."""

SAMPLE = "Hello, World! naïve 東京 🙂\n  def f(x):\treturn x + 123\r\n"
"""Copies of a tokenizer must give its ids of this text."""
