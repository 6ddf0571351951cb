"""Recipes: from a configuration to a wired Trainer, and from photos to a report."""
