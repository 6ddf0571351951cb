"""Rate and remaining time, with and without a terminal."""

import pytest

from roadwork_dist.recipes import progress
from roadwork_dist.recipes.progress import Pace, progress_bar


def test_what_was_done_before_does_not_count_for_the_pace() -> None:
    now = [100.0]
    pace = Pace(lambda: now[0])
    assert pace.left() == "-:--:--"
    pace.update(500, 8000)
    now[0] += 10
    pace.update(520, 8000)
    assert pace.rate == pytest.approx(2.0)
    assert pace.left() == "1:02:20"  # 7480 at 2 a second


def test_off_a_terminal_lines_come_now_and_then_and_one_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with progress_bar("features of x", unit="images") as advance:
        advance(3, 10)
        advance(6, 10)
        advance(10, 10)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("features of x: 6 of 10, ")
    assert lines[1].endswith(" left")
    assert " images/s, 0:00:0" in lines[1]
    assert lines[-1].startswith("features of x: 10 of 10, ")
    assert ", 3 were there, " in lines[-1]
    assert lines[-1].endswith(" images/s")


def test_without_a_unit_there_are_numbers_only(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("checking x") as advance:
        advance(0, 2)
        advance(2, 2)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("checking x: 2 of 2, ")
    assert line.endswith(" s")
