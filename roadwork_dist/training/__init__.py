"""Floor 5: the loop."""
