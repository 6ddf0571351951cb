"""Errors, files, locks, random numbers, registries. Imports nothing else from the package."""
