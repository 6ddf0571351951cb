"""Floor 3: from photos on disk to batches."""
