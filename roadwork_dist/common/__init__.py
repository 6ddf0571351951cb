"""Errors, files, locks, randomness, registries. Imports nothing else of the package."""
