"""Verify the checksums of parts that were modified since they were last verified."""

import warnings

from roadwork_dist.features.store.catalogue import Catalogue
from roadwork_dist.features.store.locks import is_locked
from roadwork_dist.features.store.part import damaged_entries


def check_touched(
    catalogue: Catalogue, view_bytes: int
) -> tuple[dict[str, tuple[int, int]], list[tuple[str, int]]]:
    """Read the parts modified since they were last known to be intact; warn about damaged ones.

    Parts that a running process writes to are skipped.

    Args:
        catalogue: catalogue of the space.
        view_bytes: bytes of one view.

    Returns:
        State (size, mtime) of each part that was read, by name, and (part, offset) of every damaged
        entry.
    """
    trusted: dict[str, tuple[int, int]] = {}
    dropped: list[tuple[str, int]] = []
    for number, part in enumerate(catalogue.parts):
        if part.is_trusted() or is_locked(part.files.log):
            continue
        trusted[part.files.name] = part.files.state()
        entries = catalogue.entries_of(number)
        offsets = [int(entries.offset[row]) for row in damaged_entries(part.files, entries, view_bytes)]
        if offsets:
            warnings.warn(
                f"{part.files.values} is damaged ({len(offsets)} of {len(entries)} entries, the first at "
                f"byte {min(offsets)}): they will be computed again",
                RuntimeWarning,
                stacklevel=2,
            )
        dropped += [(part.files.name, offset) for offset in offsets]
    return trusted, dropped
