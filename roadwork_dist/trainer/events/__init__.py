"""The callback interface of the training loop, and the state passed to callbacks."""
