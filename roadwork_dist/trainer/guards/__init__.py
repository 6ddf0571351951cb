"""Callbacks that handle hangs, preemption, lost launchers and concurrent runs, and explain torch's errors."""
