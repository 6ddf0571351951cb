"""Floor 9: thin commands."""
