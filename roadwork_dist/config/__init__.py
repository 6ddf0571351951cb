"""The detector's settings, their files and presets, and the batch that its parts exchange."""
