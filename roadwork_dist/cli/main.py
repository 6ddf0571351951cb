"""``roadwork-dist``: dispatches to the command and reports errors in one line.

Commands are imported only when they run, so that ``--help`` is fast.
"""

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from roadwork_dist import __version__
from roadwork_dist.common.errors import ConfigError, InterruptedRunError, RoadworkError
from roadwork_dist.common.registry import nearest

COMMANDS = {
    "synth": "render a synthetic data set of street scenes",
    "data": "check the photos and tables of a data set: `data check`",
    "shard": "write photos as WebDataset shards with an index",
    "features": "compute the backbone's features in advance; list, verify or prune stored ones",
    "pretrain": "train, evaluate and report; a restart resumes the run",
    "evaluate": "evaluate a trained run on its own or another data set",
    "predict": "predict the probability of roadwork for photos and folders",
    "select-views": "train a scorer that selects crops for the backbone (views.select)",
    "report": "write the report of a run again",
    "checkpoint": "list, verify, consolidate or prune the checkpoints of a run",
    "doctor": "show what this machine has, what is missing and how to get it",
    "demo-real": "train on real photographs and print out-of-fold MCC",
}

RENAMED = {"distil": "select-views"}
"""Former command names, which still work."""

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_ASKED_TO_STOP = 75
"""EX_TEMPFAIL of sysexits.h, "try again later": state is saved and a restart resumes the run."""


def usage() -> str:
    """The text of ``roadwork-dist --help``."""
    commands = "\n".join(f"  {name:<12} {text}" for name, text in COMMANDS.items())
    return (
        f"roadwork-dist {__version__}: train detectors of roadwork in street photos\n\n"
        f"usage: roadwork-dist [--debug] COMMAND ...\n\n{commands}\n\n"
        "roadwork-dist COMMAND --help shows details. --debug shows tracebacks."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        Exit code: 0, 1 if a verified checkpoint or feature is damaged, 2 after an error that the user can
        fix, 3 if some photos could not be predicted, 75 if a run was asked to stop (SIGTERM, SIGUSR1) and
        has saved its state, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    try:
        return _run(words[0], words[1:])
    except InterruptedRunError as error:
        _ignore_stop_signals()
        print(str(error), file=sys.stderr)
        return EXIT_ASKED_TO_STOP
    except RoadworkError as error:
        if debug:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # the reader, such as `| head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, missing permission: the user can fix these too
        if debug:
            raise
        print(f"error: {error}; make room or fix permissions, then start again", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _ignore_stop_signals() -> None:
    """Ignore further requests to stop: launchers repeat them, and another would replace the exit code."""
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _one_line(error: RoadworkError) -> str:
    """The message. From a data loader process, torch wraps it in the traceback of that process."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return text


def _run(command: str, arguments: list[str]) -> int:
    if command in RENAMED:
        print(f"{command} is now called {RENAMED[command]}; the old name still works", file=sys.stderr)
        command = RENAMED[command]
    if command not in COMMANDS:
        close = nearest(command, list(COMMANDS), n=1)[0]
        raise ConfigError(f"unknown command {command!r}: did you mean {close!r}? see roadwork-dist --help")
    module = import_module(f"roadwork_dist.cli.{command.replace('-', '_')}")
    code: int = module.run(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main())
