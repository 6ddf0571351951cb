"""Floor 7: evaluation and the report."""
