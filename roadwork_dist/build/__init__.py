"""Floor 8: from a configuration to a wired Trainer, and a run from photos to a report."""
