"""Logging to stderr as plain lines."""

import logging
import os
import warnings


def set_up_logging() -> None:
    """Show warnings and this package's messages; only rank 0 shows messages below the level of warnings."""
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("roadwork_dist").setLevel(logging.INFO if is_main else logging.WARNING)
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
