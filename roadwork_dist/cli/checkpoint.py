"""``roadwork-dist checkpoint``: lists, verifies, consolidates and prunes the checkpoints of a run."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from roadwork_dist.cli.arguments import Parser, whole_number
from roadwork_dist.cli.sizes import age, size
from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.registry import nearest

if TYPE_CHECKING:
    from roadwork_dist.trainer.checkpoint.inspection import Summary

EXIT_DAMAGED = 1

USAGE = """usage: roadwork-dist checkpoint list|verify|consolidate|prune RUN ...

  list         show step, epoch, figure, size, processes, engine, age, and whether it is complete
  verify       read every file and compare it with the manifest; exit code 1 if one is damaged
  consolidate  write the weights as one safetensors file
  prune        delete all but the newest and the best

RUN is a run folder; all commands except prune also accept a checkpoint folder (step-…).
roadwork-dist checkpoint COMMAND --help shows details."""


def run(arguments: Sequence[str]) -> int:
    """Run a subcommand; returns 0, or 1 if ``verify`` finds a damaged checkpoint.

    Raises:
        ConfigError: the subcommand is unknown.
    """
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "list": _list,
        "verify": _verify,
        "consolidate": _consolidate,
        "prune": _prune,
    }
    if words[0] not in commands:
        close = nearest(words[0], list(commands), n=1)[0]
        raise ConfigError(
            f"unknown command 'checkpoint {words[0]}': did you mean 'checkpoint {close}'? see roadwork-dist "
            "checkpoint --help"
        )
    return commands[words[0]](words[1:])


def _parser(command: str, description: str, what: str) -> Parser:
    parser = Parser(f"roadwork-dist checkpoint {command}", description)
    parser.add_argument("run", metavar="RUN", type=Path, help=what)
    return parser


_EITHER = "run folder or checkpoint folder"


def _list(arguments: Sequence[str]) -> int:
    parser = _parser(
        "list", "List checkpoints. File sizes are compared with the manifest, contents are not.", _EITHER
    )
    options = parser.parse(arguments)
    from roadwork_dist.trainer.checkpoint.inspection import checkpoints_at, summary

    rows = [_row(summary(path)) for path in checkpoints_at(options.run)]
    rows.insert(0, ["step", "epoch", "figure", "size", "processes", "engine", "age", "complete"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row(each: "Summary") -> list[str]:
    figure = "-" if each.figure is None else f"{each.monitor} {each.figure:.4f}{' *' if each.is_best else ''}"
    return [
        each.path.name.removeprefix("step-").lstrip("0") or "0" if each.step is None else str(each.step),
        "-" if each.epoch is None else str(each.epoch),
        figure,
        size(each.size),
        "-" if each.processes is None else str(each.processes),
        each.engine or "-",
        "-" if each.age is None else age(each.age),
        f"no: {each.wrong}" if each.wrong else "yes",
    ]


def _verify(arguments: Sequence[str]) -> int:
    parser = _parser(
        "verify", "Read every file of every checkpoint and compare it with its SHA-256.", _EITHER
    )
    options = parser.parse(arguments)
    from roadwork_dist.common.errors import CheckpointError
    from roadwork_dist.trainer.checkpoint.checkpoint_store import damage, read_manifest
    from roadwork_dist.trainer.checkpoint.inspection import checkpoints_at

    code = 0
    for path in checkpoints_at(options.run):
        try:
            files = read_manifest(path)
            found = damage(path, files)
        except CheckpointError as error:
            files, found = {}, [str(error)]
        for each in found:
            print(f"{path.name}: DAMAGED: {each}")
        if not found:
            total = sum(int(entry["bytes"]) for entry in files.values())
            print(f"{path.name}: whole, {len(files)} files, {size(total)}")
        code = EXIT_DAMAGED if found else code
    return code


def _consolidate(arguments: Sequence[str]) -> int:
    parser = _parser(
        "consolidate",
        "Write the trained weights of a checkpoint as one model.safetensors under the model's own names, "
        "whatever engine and number of processes saved them. For a roadwork run, the folder can be loaded "
        "like its best/.",
        _EITHER,
    )
    parser.add_argument("output", metavar="FOLDER", type=Path, help="folder for model.safetensors")
    parser.add_argument(
        "--average", action="store_true", help="write the moving average of the weights instead"
    )
    parser.add_argument(
        "--step", type=whole_number(0), help="step of the checkpoint (default: the newest complete one)"
    )
    options = parser.parse(arguments)
    from roadwork_dist.trainer.checkpoint.consolidate import consolidate
    from roadwork_dist.trainer.checkpoint.inspection import chosen_checkpoint

    checkpoint = chosen_checkpoint(options.run, options.step)
    print(f"{checkpoint.name} → {consolidate(checkpoint, options.output, average=options.average)}")
    return 0


def _prune(arguments: Sequence[str]) -> int:
    parser = _parser(
        "prune",
        "Delete the checkpoints of a run except the newest complete ones and the best one. Damaged ones are "
        "not deleted.",
        "run folder",
    )
    parser.add_argument(
        "--keep", type=whole_number(1), default=1, help="number of newest ones to keep (default: 1)"
    )
    parser.add_argument("--dry_run", action="store_true", help="only show what would be deleted")
    options = parser.parse(arguments)
    from roadwork_dist.trainer.checkpoint.inspection import plan_pruning

    plan = plan_pruning(options.run, options.keep)
    for path in plan.kept:
        print(f"{path.name}: kept")
    for path in plan.damaged:
        print(f"{path.name}: damaged, not deleted: inspect it")
    for path in plan.gone:
        if not options.dry_run:
            shutil.rmtree(path)
        print(f"{path.name}: {'would be deleted' if options.dry_run else 'deleted'}")
    return 0
