"""A parser of arguments whose mistakes are told in one line, with the nearest option."""

import argparse
from collections.abc import Sequence
from itertools import takewhile
from typing import NoReturn

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.registry import nearest


class Parser(argparse.ArgumentParser):
    """``argparse`` that raises instead of printing its usage; options are not abbreviated."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse.

        Raises:
            ConfigError: an option is unknown (told before anything that it left missing), a value is
                wrong, or a required argument is absent.
            SystemExit: after ``--help``.
        """
        known = list(self._option_string_actions)
        for word in takewhile(lambda word: word != "--", arguments):
            name = word.split("=")[0]
            if name.startswith("--") and name not in known:
                self.error(f"unknown option {name}: did you mean {nearest(name, known, n=1)[0]}?")
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Tell what is wrong.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message}; see {self.prog} --help")
