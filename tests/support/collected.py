"""Where ``conftest`` notes which test files pytest has found."""

from pathlib import Path

import pytest

MODULES = pytest.StashKey[set[Path]]()
"""Test files that pytest has found, also those that skip themselves as a whole."""
