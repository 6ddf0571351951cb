"""Processes, devices, and the engines that distribute a model over them."""
