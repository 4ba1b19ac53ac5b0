"""Core ML: a model as a program with a key-value cache, for macOS 15 and iOS 18."""
