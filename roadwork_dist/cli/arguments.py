"""Argument parser that reports errors in one line and suggests the nearest option."""

import argparse
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from roadwork_dist.common.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """``argparse`` that raises instead of printing its usage; options cannot be abbreviated."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def add_run(self, threshold: str) -> None:
        """Add the arguments of a command that reads a run: its folder, and the decision threshold.

        Args:
            threshold: description of the default threshold, for the help.
        """
        self.add_argument("run", metavar="RUN", type=Path, help="run folder, or its best/")
        self.add_argument(
            "--threshold",
            type=probability,
            help=f"probability above which a photo is called roadwork (default: {threshold})",
        )

    def add_select(self) -> None:
        """Add the option of a command that predicts: how many crops go through the backbone."""
        self.add_argument(
            "--views.select",
            "--select",
            dest="select",
            metavar="CROPS",
            type=whole_number(1),
            help="crops that go through the backbone in addition to the global view, chosen by the selector "
            "of `roadwork-dist select-views`; 11 = all (default: views.select of the run)",
        )

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse.

        Raises:
            ConfigError: an option is unknown (reported before missing arguments), a value is wrong, or
                a required argument is missing.
            SystemExit: after ``--help``.
        """
        known = list(self._option_string_actions)
        for word in takewhile(lambda word: word != "--", arguments):
            name = word.split("=")[0]
            if name.startswith("--") and name not in known:
                close = get_close_matches(name, known, n=1)
                self.error(f"unknown option {name}{f': did you mean {close[0]}' if close else ''}")
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Raise with the message and a pointer to the help.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message}; see {self.prog} --help")


def probability(text: str) -> float:
    """Parse a number in [0, 1], for ``type=`` of an argument.

    Raises:
        argparse.ArgumentTypeError: it is not such a number.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def whole_number(at_least: int) -> Callable[[str], int]:
    """Parser of integers >= ``at_least``, for ``type=`` of an argument."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = at_least - 1
        if value < at_least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= {at_least}")
        return value

    return read
