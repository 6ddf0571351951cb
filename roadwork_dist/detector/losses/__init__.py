"""The parts of the loss, and their sum."""
