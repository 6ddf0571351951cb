"""Floor 6: where figures go."""
