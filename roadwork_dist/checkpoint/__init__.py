"""Floor 6: training state on disk."""
