"""Saves, loads and inspects the training state on disk."""
