"""Floor 3: the parts of the loss."""
