"""Figures with intervals, slices and the report."""
