"""``roadwork-dist features``: computes features in advance, and maintains the feature store."""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from roadwork_dist.cli.arguments import Parser
from roadwork_dist.cli.sizes import age, size
from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.registry import nearest

EXIT_DAMAGED = 1
DEFAULT_DIR = "runs/features"

USAGE = """usage: roadwork-dist features [--config NAME] [--data.train …] [any setting of pretrain]
       roadwork-dist features list|verify|prune [--dir FOLDER] ...

Without a command: compute the features that a run with these settings needs and that are missing from
the store (features.dir); under `accelerate launch` or torchrun each process computes its share. Stored
features are not computed again, even after the command was killed.

  list    show what is stored: entries, size, last use, and sources
  verify  read everything and report what is damaged; exit code 1 if something is
  prune   delete features that were not used for a while, and unfinished files

roadwork-dist features COMMAND --help shows details; roadwork-dist pretrain --help lists the settings."""


def run(arguments: Sequence[str]) -> int:
    """Compute features or run a subcommand; returns 0, or 1 if ``verify`` finds something damaged.

    Raises:
        ConfigError: the subcommand is unknown.
    """
    words = list(arguments)
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "list": _list,
        "verify": _verify,
        "prune": _prune,
    }
    if words[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if words and words[0] in commands:
        return commands[words[0]](words[1:])
    if words and not words[0].startswith("-"):
        close = nearest(words[0], list(commands), n=1)[0]
        raise ConfigError(
            f"unknown command 'features {words[0]}': did you mean 'features {close}'? see roadwork-dist "
            "features --help"
        )
    return _extract(words)


def _extract(arguments: Sequence[str]) -> int:
    from roadwork_dist.cli.logs import set_up_logging
    from roadwork_dist.config.io import parse_experiment

    config = parse_experiment(arguments, prog="roadwork-dist features")
    set_up_logging()
    # Imported after parsing, so that --help and argument errors do not wait for torch.
    from roadwork_dist.recipes.features import extract_features

    done = extract_features(config)
    if os.environ.get("RANK", "0") == "0":
        for each in done:
            print(each)
    return 0


def _parser(command: str, description: str) -> Parser:
    parser = Parser(f"roadwork-dist features {command}", description)
    parser.add_argument(
        "--dir",
        metavar="FOLDER",
        type=Path,
        default=Path(DEFAULT_DIR),
        help=f"the feature store: features.dir of the runs (default: {DEFAULT_DIR})",
    )
    return parser


def _list(arguments: Sequence[str]) -> int:
    options = _parser("list", "List the kinds of features in a store.").parse(arguments)
    from roadwork_dist.features.store.upkeep import spaces_in, summary_of

    spaces = [summary_of(folder) for folder in spaces_in(options.dir)]
    for space in sorted(spaces, key=lambda each: -each.last_used):
        used = "in use" if space.in_use else f"last used {age(time.time() - space.last_used)} ago"
        print(f"{space.folder.name}  {space.entries} entries  {size(space.size)}  {used}")
        print(f"    {space.words}")
        for name, photos in space.sources.items():
            print(f"    of {name} ({photos} photos)")
    total = sum(space.size for space in spaces)
    print(f"{options.dir}: {len(spaces)} kinds of features, {size(total)}")
    return 0


def _verify(arguments: Sequence[str]) -> int:
    parser = _parser(
        "verify",
        "Read every entry and compare it with its checksum. Damaged ones are removed from the index, and the "
        "next run that needs them computes them again.",
    )
    options = parser.parse(arguments)
    from roadwork_dist.features.store.upkeep import spaces_in, summary_of, verify

    code = 0
    for folder in spaces_in(options.dir):
        entries, found = summary_of(folder).entries, 0
        for each in verify(folder):
            print(f"{folder.name}: DAMAGED: {each}")
            found += 1
        if found:
            code = EXIT_DAMAGED
            print(f"{folder.name}: {found} of {entries} entries are damaged and will be computed again")
        else:
            print(f"{folder.name}: whole, {entries} entries")
    return code


def _prune(arguments: Sequence[str]) -> int:
    parser = _parser(
        "prune",
        "Delete features that no run has used for a while, and unfinished files. Features in use by a "
        "running process are kept. Without --yes, only show what would be deleted.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="delete only these kinds of features")
    parser.add_argument(
        "--unused_days", type=_days, default=30.0, help="days since the last use (default: 30)"
    )
    parser.add_argument("--yes", action="store_true", help="delete instead of only showing")
    options = parser.parse(arguments)
    from roadwork_dist.features.store.upkeep import plan_pruning, remove

    plan = plan_pruning(options.dir, older_than=options.unused_days, names=options.names)
    for each in plan:
        kept = remove(each) if options.yes else None
        if kept is not None:
            print(f"{each.path}: stays: {kept}")
        else:
            what = "deleted" if options.yes else "would be deleted"
            print(f"{each.path}: {each.why}, {size(each.size)}: {what}")
    if not plan:
        print(f"{options.dir}: nothing to delete")
    elif not options.yes:
        print("nothing was deleted: add --yes")
    return 0


def _days(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 0")
    return value
