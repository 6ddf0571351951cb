"""Workflows of the commands: training, cross-validation, evaluation, feature extraction, data checks."""
