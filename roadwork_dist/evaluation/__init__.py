"""Evaluation: metrics with intervals, slices and the HTML report."""
