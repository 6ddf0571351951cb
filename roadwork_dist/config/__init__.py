"""Settings of the detector, their files and presets, and the batch type that its parts exchange."""
