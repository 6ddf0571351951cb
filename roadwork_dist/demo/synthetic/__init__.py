"""Synthetic street scenes with exact masks, for the demo and the tests."""

from roadwork_dist.demo.synthetic.dataset import SyntheticSet, write_synthetic

__all__ = ["SyntheticSet", "write_synthetic"]
