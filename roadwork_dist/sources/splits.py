"""Stratified splits that never divide the photos of one place.

Near-duplicate photos of one street on both sides of a split would inflate every metric, so photos are
grouped by place first.
"""

import json
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.sources.gps import EARTH_RADIUS_KM

Ints = NDArray[np.int64]
Counts = NDArray[np.float64]

_ATTEMPTS = 5  # random splits, of which the one closest to the requested share is kept


def places(coordinates: NDArray[np.float64], radius_m: float = 150.0) -> Ints:
    """Group photos by place: photos linked by steps of at most ``radius_m`` form one place.

    Args:
        coordinates: ``[N, 2]`` latitude and longitude in degrees; each row with NaN is its own group.
        radius_m: longest step in metres (great circle).

    Returns:
        ``[N]`` group numbers.
    """
    from sklearn.cluster import DBSCAN

    known = ~np.isnan(coordinates).any(axis=1)
    groups = np.arange(len(coordinates), dtype=np.int64)
    if known.any():
        # With min_samples 1 every photo is a core point, so clusters are the connected components.
        chained = DBSCAN(
            eps=radius_m / 1000 / EARTH_RADIUS_KM, min_samples=1, metric="haversine", algorithm="ball_tree"
        ).fit_predict(np.radians(coordinates[known]))
        groups[known] = len(coordinates) + chained
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def groups_of(manifest: Manifest) -> Ints:
    """Group ``[N]`` of each photo: photos of one place or of one group in the data are linked.

    Links are transitive: two groups that share a place are one.
    """
    named = [("row", str(i)) if s.group is None else ("group", s.group) for i, s in enumerate(manifest)]
    partitions = (places(manifest.coordinates), _group_numbers(named, len(manifest)))
    groups = np.arange(len(manifest), dtype=np.int64)
    before = np.full_like(groups, -1)
    while (groups != before).any():  # every photo takes the smallest number of its linked photos
        before = groups.copy()
        for parts in partitions:
            smallest = np.full(len(groups), len(groups), dtype=np.int64)
            np.minimum.at(smallest, parts, groups)
            groups = smallest[parts]
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def folds(
    labels: Sequence[int] | Ints, groups: Sequence[Hashable] | Ints | None, k: int = 5, seed: int = 42
) -> Ints:
    """Fold of each row: stratified by label, shuffled, no group in two folds.

    Args:
        labels: ``[N]`` labels to stratify by.
        groups: ``[N]`` group of each row; None = every row is its own.
        k: number of folds, at least 2.
        seed: seed of the shuffle.

    Returns:
        ``[N]`` fold numbers from 0 to ``k`` − 1; fold f validates the model trained on the others.

    Raises:
        DataError: a label has fewer rows or groups than there are folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    y = np.asarray(labels, dtype=np.int64)
    numbers = _group_numbers(groups, len(y))
    _check_enough(y, numbers, k)
    alone = len(np.unique(numbers)) == len(numbers)
    splitter = (StratifiedKFold if alone else StratifiedGroupKFold)(k, shuffle=True, random_state=seed)
    result = np.empty(len(y), dtype=np.int64)
    parts = splitter.split(y[:, None], y, None if alone else numbers)
    for fold, (_, validation) in enumerate(parts):
        result[validation] = fold
    return result


def stratified_group_split(
    labels: Sequence[int] | Ints, groups: Sequence[Hashable] | Ints | None, share: float, seed: int
) -> tuple[Ints, Ints]:
    """Split rows in two, stratified by label, no group on both sides.

    Groups are assigned in shuffled order: a group goes to the second side if that brings the labels' shares
    there closer to ``share``. A label with two groups or more is on both sides if groups of mixed labels
    allow it. (scikit-learn splits by groups or by strata, or into equal folds.)

    Args:
        labels: ``[N]`` labels to stratify by.
        groups: ``[N]`` group of each row; None = every row is its own.
        share: share of rows on the second side, in (0, 1).
        seed: seed of the shuffle.

    Returns:
        Sorted indices of the first side (share 1 − ``share``) and of the second.

    Raises:
        DataError: there are fewer than two groups, or ``share`` is not in (0, 1).
    """
    y = np.asarray(labels, dtype=np.int64)
    numbers = _group_numbers(groups, len(y))
    _, classes = np.unique(y, return_inverse=True)
    group_count = len(np.unique(numbers))
    if group_count < 2 or not 0 < share < 1:
        raise DataError(
            f"cannot split {len(y)} rows of {group_count} places by a share of {share}, expected two places "
            "or more and a share between 0 and 1: give a validation set with data.val or add photos"
        )
    counts = np.zeros((group_count, classes.max() + 1))  # rows of each label in each group
    np.add.at(counts, (numbers, classes), 1)
    second = _best_split(counts, share, np.random.default_rng(seed))
    return np.flatnonzero(~second[numbers]), np.flatnonzero(second[numbers])


def save_folds(path: Path, ids: Sequence[str], fold_of_row: Ints) -> None:
    """Write the fold of each id as JSON, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    content = {"folds": dict(zip(ids, fold_of_row.tolist(), strict=True))}
    write_atomic(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def load_folds(path: Path, ids: Sequence[str]) -> Ints:
    """The fold ``[N]`` of each id, from a file written by :func:`save_folds`.

    Raises:
        DataError: the file cannot be read, or its ids differ from ``ids``.
    """
    try:
        saved = json.loads(path.read_text("utf-8"))["folds"]
        fold_of_id = {str(name): int(fold) for name, fold in saved.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}: {error}), expected a JSON file of folds: "
            "delete it to make new folds"
        ) from error
    missing = [name for name in ids if name not in fold_of_id]
    surplus = set(fold_of_id) - set(ids)
    if missing or surplus:
        example = missing[0] if missing else min(surplus)
        raise DataError(
            f"{path}: belongs to another set of photos ({len(missing)} ids without a fold, {len(surplus)} "
            f"that are not in the set, for example {example!r}), expected the same ids: use the set it was "
            "made from, or delete it to make new folds"
        )
    return np.array([fold_of_id[name] for name in ids], dtype=np.int64)


def _group_numbers(groups: Sequence[Hashable] | Ints | None, length: int) -> Ints:
    if groups is None:
        return np.arange(length, dtype=np.int64)
    if len(groups) != length:
        raise DataError(f"{len(groups)} groups for {length} labels, expected one for each row")
    number_of: dict[Hashable, int] = {}
    values: Sequence[Hashable] = groups.tolist() if isinstance(groups, np.ndarray) else groups
    return np.array([number_of.setdefault(group, len(number_of)) for group in values], dtype=np.int64)


def _check_enough(y: Ints, groups: Ints, k: int) -> None:
    if k < 2:
        raise DataError(f"got {k} folds, expected at least 2")
    for label in np.unique(y):
        own = len(np.unique(groups[y == label]))
        if own < k:
            raise DataError(
                f"label {label} has photos of {own} places only, expected at least {k} for {k} folds: "
                "use fewer folds or add photos"
            )


def _best_split(counts: Counts, share: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Which groups go to the second side; the best of some random splits. ``counts`` is ``[G, labels]``."""
    shares = counts / counts.sum(axis=0)  # share of each label that a group holds
    attempts = [_random_split(shares, share, generator.permutation(len(counts))) for _ in range(_ATTEMPTS)]
    return min(attempts, key=lambda second: _deviation(shares[second].sum(axis=0).tolist(), share))


def _random_split(shares: Counts, share: float, order: Ints) -> NDArray[np.bool_]:
    second = np.zeros(len(shares), dtype=bool)
    taken = [0.0] * shares.shape[1]
    rows = shares.tolist()  # Python floats: numpy is slow on vectors of two
    for group in order.tolist():
        with_it = [old + new for old, new in zip(taken, rows[group], strict=True)]
        if _deviation(with_it, share) < _deviation(taken, share):
            second[group] = True
            taken = with_it
    for label in np.flatnonzero((shares > 0).sum(axis=0) >= 2):
        own = np.flatnonzero(shares[:, label])
        if second[own].all() or not second[own].any():  # a rare label is missing on one side
            smallest = own[np.argmin(shares[own].sum(axis=1))]
            second[smallest] = ~second[smallest]
    if second.all() or not second.any():
        second[order[-1]] = ~second[order[-1]]
    return second


def _deviation(taken: list[float], share: float) -> float:
    """Distance of the second side's label shares from ``share``, summed over labels."""
    return sum(abs(part - share) for part in taken)
