"""Callbacks that change training: weight averaging, loss spikes, non-finite steps, batch size search."""
