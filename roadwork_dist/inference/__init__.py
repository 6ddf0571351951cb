"""Predictions of a trained model for photos."""
