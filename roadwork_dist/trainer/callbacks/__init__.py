"""Callbacks that change how a run trains: the average, spikes of the loss, the batch size."""
