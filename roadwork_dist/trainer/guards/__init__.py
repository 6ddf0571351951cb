"""Callbacks that protect a run from the machine, the scheduler and its peers."""
