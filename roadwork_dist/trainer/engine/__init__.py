"""Processes, devices and the libraries that spread a model over them."""
