"""Floor 5: what the training loop tells its observers."""
