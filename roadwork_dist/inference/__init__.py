"""Inference: predictions of a trained model for photos."""
