"""Floor 2: processes and devices."""
