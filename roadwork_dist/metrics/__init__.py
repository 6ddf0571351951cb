"""Floor 4: figures of merit and their intervals."""
