"""Estimate the memory, communication and time of training from formulas, without running it."""
