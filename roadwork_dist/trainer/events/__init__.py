"""What the training loop tells its callbacks."""
