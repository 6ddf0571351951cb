"""Floor 1: the configuration's schema, its files and its presets."""
