"""Thin commands: they read arguments, call a recipe and say what came out."""
