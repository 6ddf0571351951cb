"""Callbacks that write figures to disk, to the screen and to trackers."""
