import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork_dist.common.errors import DataError
from roadwork_dist.photos.images import FileImage
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.sources.splits import (
    folds,
    groups_of,
    load_folds,
    places,
    save_folds,
    stratified_group_split,
)

METRE = 180 / (math.pi * 6371008.8)  # degrees of latitude


def some_set(rows: int = 251, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    groups = generator.integers(0, rows // 3, rows)
    return (generator.random(rows) < 0.3).astype(np.int64), groups


def test_places_chain_photos_and_keep_unknown_ones_apart() -> None:
    step = [(40 + n * 140 * METRE, -75.0) for n in range(3)]  # 280 m from first to last, by steps of 140
    far = (40 + 440 * METRE, -75.0)
    unknown = (math.nan, math.nan)
    groups = places(np.array([step[0], unknown, step[2], far, step[1], unknown]))
    assert groups[0] == groups[2] == groups[4]
    assert len(set(groups.tolist())) == 4
    assert sorted(set(groups.tolist())) == [0, 1, 2, 3]
    assert len(set(places(np.array([step[0], step[1]]), radius_m=139).tolist())) == 2
    assert len(set(places(np.full((3, 2), math.nan)).tolist())) == 3


def test_places_cross_the_date_line() -> None:
    assert len(set(places(np.array([[0, 180 - 50 * METRE], [0, -180 + 50 * METRE]])).tolist())) == 1


def test_groups_chain_places_and_named_groups() -> None:
    def sample(name: str, latitude: float | None, group: str | None) -> Sample:
        longitude = None if latitude is None else -75.0
        return Sample(name, FileImage(Path(name)), latitude=latitude, longitude=longitude, group=group)

    rows = [
        sample("a", 40.0, "drive 1"),
        sample("b", None, "drive 1"),
        sample("c", 40.0, "drive 2"),  # the place of a
        sample("d", 50.0, "drive 2"),
        sample("e", 50.0, None),  # the place of d
        sample("f", None, None),
        sample("g", None, None),
        sample("h", None, "5"),  # a name that is another row's number
    ]
    for order in (rows, rows[::-1]):
        groups = groups_of(Manifest("m", tuple(order))).tolist()
        named = {s.id: group for s, group in zip(order, groups, strict=True)}
        assert len({named[name] for name in "abcde"}) == 1
        assert len(set(groups)) == 4
        assert set(groups) == {0, 1, 2, 3}


@pytest.mark.parametrize("grouped", [True, False])
def test_folds_part_no_group_and_keep_the_strata(grouped: bool) -> None:
    labels, groups = some_set()
    fold = folds(labels, groups if grouped else None)
    assert set(fold.tolist()) == set(range(5))
    if grouped:
        for group in np.unique(groups):
            assert len(set(fold[groups == group].tolist())) == 1
    for number in range(5):
        assert abs((fold == number).mean() - 0.2) < 0.03
        assert abs(labels[fold == number].mean() - labels.mean()) < 0.04
    np.testing.assert_array_equal(fold, folds(labels, groups if grouped else None))
    assert (fold != folds(labels, groups if grouped else None, seed=43)).any()


def test_folds_do_not_follow_the_order_of_rows() -> None:
    fold = folds([0, 1] * 50, None)
    assert len(set(fold[:20].tolist())) == 5


def test_folds_need_enough_places_of_each_label() -> None:
    with pytest.raises(DataError, match="label 1 has photos of 4 places only, expected at least 5"):
        folds([0] * 20 + [1] * 8, [*range(20), *[100, 101, 102, 103] * 2])
    with pytest.raises(DataError, match="got 1 folds"):
        folds([0, 1], None, k=1)
    with pytest.raises(DataError, match="1 groups for 2 labels"):
        folds([0, 1], [1])


@pytest.mark.parametrize("share", [0.15, 0.4, 0.7])
@pytest.mark.parametrize("grouped", [True, False])
def test_split_has_the_share_in_every_stratum(share: float, grouped: bool) -> None:
    labels, groups = some_set()
    first, second = stratified_group_split(labels, groups if grouped else None, share, seed=3)
    assert sorted([*first, *second]) == list(range(len(labels)))
    for label in (0, 1):
        assert abs((labels[second] == label).sum() / (labels == label).sum() - share) < 0.04
    if grouped:
        assert not set(groups[first]) & set(groups[second])
    again = stratified_group_split(labels, groups if grouped else None, share, seed=3)
    np.testing.assert_array_equal(second, again[1])
    assert not np.array_equal(second, stratified_group_split(labels, groups, share, seed=4)[1])


@given(
    st.lists(st.tuples(st.integers(-1, 1), st.integers(0, 6)), min_size=2, max_size=30).filter(
        lambda rows: len({group for _, group in rows}) >= 2
    ),
    st.floats(0.05, 0.95),
    st.integers(0, 5),
)
@settings(max_examples=100, deadline=None)
def test_split_never_parts_a_group_nor_leaves_a_side_empty(
    rows: list[tuple[int, int]], share: float, seed: int
) -> None:
    labels, groups = np.array(rows).T
    first, second = stratified_group_split(labels, groups, share, seed)
    assert len(first)
    assert len(second)
    assert sorted([*first, *second]) == list(range(len(rows)))
    assert not set(groups[first]) & set(groups[second])


def test_a_rare_label_stands_on_both_sides() -> None:
    labels = [0] * 98 + [1, 1]
    for seed in range(5):
        first, second = stratified_group_split(labels, None, 0.1, seed)
        assert {0, 1} == set(np.array(labels)[first]) == set(np.array(labels)[second])


def test_what_cannot_be_split_is_an_error() -> None:
    with pytest.raises(DataError, match="cannot split 3 rows of 1 places"):
        stratified_group_split([0, 1, 0], [5, 5, 5], 0.5, 0)
    with pytest.raises(DataError, match="a share of 1"):
        stratified_group_split([0, 1], None, 1.0, 0)


def test_folds_are_saved_by_id(tmp_path: Path) -> None:
    path = tmp_path / "folds.json"
    save_folds(path, ["a", "b", "ç"], np.array([2, 0, 1]))
    assert load_folds(path, ["ç", "a", "b"]).tolist() == [1, 2, 0]
    for ids in (["a", "b"], ["a", "b", "ç", "d"], ["a", "b", "c"]):
        with pytest.raises(DataError, match=r"folds.json: belongs to another set of photos"):
            load_folds(path, ids)


@pytest.mark.parametrize("content", ["", "[]", '{"folds": 3}', '{"folds": {"a": "x"}}'])
def test_unreadable_fold_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "folds.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"folds.json: cannot be read"):
        load_folds(path, ["a"])
    with pytest.raises(DataError, match="cannot be read"):
        load_folds(tmp_path / "absent.json", ["a"])
