"""The Trainer: trains any ``nn.Module``. It imports ``metrics`` and ``common`` alone."""
