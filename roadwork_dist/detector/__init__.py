"""The roadwork detector: backbone, head, losses and the task that trains it."""
