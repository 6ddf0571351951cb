"""Locks on open files."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from roadwork_dist.common import flock
from roadwork_dist.common.flock import Flock, give_back, is_at, take


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


@pytest.fixture
def two(path: Path) -> Iterator[tuple[int, int]]:
    """The file, opened twice, as by two processes."""
    handles = tuple(os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    yield handles[0], handles[1]
    for handle in handles:
        try:
            os.close(handle)
        except OSError:  # given back in the test
            continue


def test_one_holds_it_and_then_the_other(two: tuple[int, int]) -> None:
    first, second = two
    assert take(first) is Flock.HELD
    assert take(second) is Flock.OTHERS
    assert take(second, shared=True) is Flock.OTHERS
    give_back(first)
    assert take(second) is Flock.HELD


def test_several_share_it_and_keep_one_alone_out(two: tuple[int, int], path: Path) -> None:
    first, second = two
    assert take(first, shared=True) is Flock.HELD
    assert take(second, shared=True) is Flock.HELD
    third = os.open(path, os.O_RDWR)
    assert take(third) is Flock.OTHERS
    os.close(third)


def test_it_is_waited_for(two: tuple[int, int]) -> None:
    first, second = two
    take(first)
    timer = threading.Timer(0.2, give_back, [first])
    timer.start()
    assert take(second, wait=True) is Flock.HELD
    timer.join()


def test_given_back_it_is_free_also_where_a_child_has_the_file_open(two: tuple[int, int]) -> None:
    first, second = two
    take(first)
    childs = os.dup(first)  # what fork leaves a child: the same open file
    give_back(first)
    assert take(second) is Flock.HELD
    os.close(childs)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK], ids=errno.errorcode.get)
def test_a_file_system_without_locks_says_so(
    number: int, two: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(flock.fcntl, "flock", refuse)
    assert take(two[0]) is Flock.UNSUPPORTED
    give_back(two[0])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(two[0])


def test_a_broken_file_system_is_no_other_process(
    two: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(flock.fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        take(two[0])


def test_a_system_without_locks_says_so(two: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flock, "HAS_FLOCK", False)
    assert take(two[0]) is Flock.UNSUPPORTED
    give_back(two[0])


def test_a_file_that_was_removed_or_replaced_is_not_at_its_path(two: tuple[int, int], path: Path) -> None:
    assert is_at(two[0], path)
    path.unlink()
    assert not is_at(two[0], path)
    path.touch()
    assert not is_at(two[0], path)
