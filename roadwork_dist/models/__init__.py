"""Floor 3: backbones and the detector."""
