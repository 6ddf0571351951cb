"""The parts of the loss, and their sum. Every module of this folder may register a part."""

from roadwork_dist.common.registry import import_modules

# In this order they are added up and logged; a new one comes after them.
import_modules(__name__, __path__, first=("focal", "consistency", "weather", "dice", "balance"))
