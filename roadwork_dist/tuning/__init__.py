"""Floor 5: settings that are found by trying."""
