"""``roadwork-dist data check``: reports data problems that would stop a run before training."""

import sys
from collections.abc import Sequence

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.registry import nearest
from roadwork_dist.config.io import parse_experiment

EXIT_PROBLEMS = 2

USAGE = """usage: roadwork-dist data check [SOURCE] [--config NAME] [--data.train …] [any setting of pretrain]

Read every table and decode every photo that a run with these settings would use, and report what would
stop it before training. With SOURCE, check only that one: a table, a folder with metadata.csv, a folder
of shards (sizes, checksums and members are checked too), a Hugging Face data set, hf:owner/name:split or
a COCO file.

Exit code: 0 = nothing would stop a run, 2 = something would.
roadwork-dist pretrain --help lists the settings."""


def run(arguments: Sequence[str]) -> int:
    """Check one source or all of an experiment; returns 0, or 2 if something would stop a run."""
    words = list(arguments)
    if not words or words[0] in ("-h", "--help") or "--help" in words or "-h" in words:
        print(USAGE)
        return 0
    if words[0] != "check":
        raise ConfigError(
            f"unknown command 'data {words[0]}': did you mean 'data {nearest(words[0], ['check'], n=1)[0]}'? "
            "see roadwork-dist data --help"
        )
    source = words.pop(1) if len(words) > 1 and not words[1].startswith("-") else None
    config = parse_experiment(words[1:], prog="roadwork-dist data check")
    # Imported after parsing, so that argument errors do not wait for torch.
    from roadwork_dist.recipes.check import check_experiment, check_source

    problems = check_source(source, config, print) if source else check_experiment(config, print)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return EXIT_PROBLEMS
    print("nothing here would stop a run")
    return 0
