"""Synthetic street scenes with exact masks: the demo's data and the tests' data."""

from roadwork_dist.demo.synthetic.dataset import SyntheticSet, write_synthetic

__all__ = ["SyntheticSet", "write_synthetic"]
