"""Floor 7: predictions for photos."""
