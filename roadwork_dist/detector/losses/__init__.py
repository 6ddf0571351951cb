"""The parts of the loss and their weighted sum. Every module of this folder may register a part."""

from roadwork_dist.common.registry import import_modules

# The parts are summed and logged in this order; new parts follow.
import_modules(__name__, __path__, first=("focal", "consistency", "weather", "dice", "balance"))
