"""From photos on a disk or a server to the head: every stage against common alternatives.

- views: one photo to twelve views, against plain Pillow and torchvision; loaders with one and two processes
- shards: photos from shards, against files, webdataset's own pipeline and Hugging Face datasets
- remote: photos from a server, against webdataset's pipeline; what resuming in mid-epoch reads
- store: training from stored features, against memory and against computing them in each epoch

Each part runs in its own process, one after another, and prints ratios. For the options of a part see
`python benchmarks/data_views.py --help`, and so on.

    python benchmarks/data.py
    python benchmarks/data.py views store
"""

import argparse
import subprocess
import sys
from pathlib import Path

PARTS = ("views", "shards", "remote", "store")


def main(words: list[str] | None = None) -> int:
    """Run the parts.

    Returns:
        0, or the exit code of the first part that failed; the others are still run.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)} (default: all)")
    chosen = parser.parse_args(words).parts or list(PARTS)
    if unknown := sorted(set(chosen) - set(PARTS)):
        parser.error(f"no such part: {', '.join(unknown)}; choose of {', '.join(PARTS)}")
    failed = 0
    for part in chosen:
        print(f"\n## {part}\n", flush=True)
        code = subprocess.run([sys.executable, str(Path(__file__).with_name(f"data_{part}.py"))]).returncode
        failed = failed or code
    return failed


if __name__ == "__main__":
    sys.exit(main())
