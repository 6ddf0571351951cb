"""Thin commands: they parse arguments, call a recipe and print the result."""
