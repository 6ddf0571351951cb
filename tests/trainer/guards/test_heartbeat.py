"""Reading the stack of another thread."""

import errno
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from roadwork_dist.trainer.guards import heartbeat
from roadwork_dist.trainer.guards.heartbeat import FRAMES, innermost_lines


@contextmanager
def waiting_thread(depth: int = 0) -> Iterator[int]:
    """Id of a thread that waits at the given recursion depth."""
    inside, end = threading.Event(), threading.Event()

    def waits_here(left: int) -> None:
        if left:
            waits_here(left - 1)
        else:
            inside.set()
            end.wait(60)

    thread = threading.Thread(target=waits_here, args=(depth,))
    thread.start()
    inside.wait(60)
    try:
        yield thread.ident or 0
    finally:
        end.set()
        thread.join()


def names(where: list[str]) -> list[str]:
    return [line.rpartition(" in ")[2] for line in where]


def test_lines_are_those_of_the_thread_that_was_asked_for() -> None:
    with waiting_thread() as other:
        theirs, own = innermost_lines(other), innermost_lines(threading.get_ident())
    assert [name for name in names(theirs) if name == "waits_here"] == ["waits_here"]
    assert names(own)[:2] == ["innermost_lines", "test_lines_are_those_of_the_thread_that_was_asked_for"]
    where = next(line for line in theirs if line.endswith("in waits_here"))
    assert where.startswith(f"{__file__}:")
    assert where.split(":")[1].split()[0].isdigit()


def test_the_innermost_lines_are_kept() -> None:
    with waiting_thread(50) as other:
        where = names(innermost_lines(other))
    assert len(where) == FRAMES
    assert where[0] == "wait"
    assert where[-1] == "waits_here"


def test_a_thread_that_has_ended_is_nowhere() -> None:
    with waiting_thread() as other:
        pass
    assert innermost_lines(other) == []


def test_no_frame_object_of_a_running_thread_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """In CPython 3.11 a frame object can outlive its call while incomplete, and then points anywhere."""

    def made(*_: Any) -> None:
        raise AssertionError("frame objects of other threads were asked for")

    with waiting_thread() as other:
        monkeypatch.setattr(sys, "_current_frames", made)
        assert "waits_here" in names(innermost_lines(other))


def test_without_room_for_the_stack_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat without frames shows that the rank lives; without a heartbeat it would be blamed."""

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(heartbeat, "_scratch", full)
    assert innermost_lines(threading.get_ident()) == []
