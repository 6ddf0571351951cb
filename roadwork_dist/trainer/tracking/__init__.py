"""Callbacks that report metrics to files, the console and experiment trackers."""
