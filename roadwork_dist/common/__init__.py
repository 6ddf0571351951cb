"""Floor 0: types, errors, randomness and files. Imports nothing else of the package."""
