"""The learning rate as a pure function of the optimizer step."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.trainer.config import ScheduleConfig
from roadwork_dist.trainer.optim.schedules import SHAPES, Schedule


def rates(total: int, peak: float = 1.0, **settings: object) -> list[float]:
    schedule = Schedule(peak, total, ScheduleConfig(**settings))  # type: ignore[arg-type]
    return [schedule.lr_at(step) for step in range(total + 1)]


def test_cosine_by_hand() -> None:
    got = rates(44, peak=2.0, name="cosine", warmup_steps=4)
    assert got[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]  # warm-up ends at the peak, where the cosine starts
    assert got[14] == pytest.approx(2.0 * 0.5 * (1 + math.sqrt(0.5)))  # a quarter of 40: cos 45°
    assert got[24] == pytest.approx(1.0)  # half: cos 90°
    assert got[44] == pytest.approx(0.0, abs=1e-15)


def test_cosine_ends_at_the_final_ratio() -> None:
    got = rates(100, name="cosine", warmup_steps=0, final_ratio=0.1)
    assert got[0] == 1.0
    assert got[50] == pytest.approx(0.55)
    assert got[100] == pytest.approx(0.1)


def test_wsd_by_hand() -> None:
    # 10 of warm-up, then 100: 80 at the peak, the last 20 fall by a twentieth each.
    got = rates(110, name="wsd", warmup_steps=10, decay_share=0.2)
    assert got[9:91] == [1.0] * 82
    assert got[91] == pytest.approx(0.95)
    assert got[100] == pytest.approx(0.5)
    assert got[109] == pytest.approx(0.05)
    assert got[110] == 0.0
    assert rates(110, name="wsd", warmup_steps=10, final_ratio=0.5)[100] == pytest.approx(0.75)


def test_constant_by_hand() -> None:
    assert rates(30, name="constant", warmup_steps=3) == [1 / 3, 2 / 3, *[1.0] * 29]


@pytest.mark.parametrize(
    ("total", "expected"), [(9, 0), (10, 1), (99, 9), (4999, 499), (5000, 500), (9000, 500)]
)
def test_warmup_is_cut_to_a_tenth_of_the_run(total: int, expected: int) -> None:
    assert Schedule(1.0, total, ScheduleConfig(warmup_steps=500)).warmup_steps == expected


@given(
    st.sampled_from(sorted(SHAPES)),
    st.integers(1, 400),
    st.integers(0, 60),
    st.floats(0, 1),
    st.floats(0.01, 1),
    st.randoms(use_true_random=False),
)
def test_rates_are_pure_within_the_peak_and_never_rise_again(
    name: str, total: int, warmup: int, final: float, decay: float, order: object
) -> None:
    config = ScheduleConfig(name=name, warmup_steps=warmup, final_ratio=final, decay_share=decay)
    schedule = Schedule(3e-4, total, config)
    steps = list(range(total))
    forwards = {step: schedule.lr_at(step) for step in steps}
    order.shuffle(steps)  # type: ignore[attr-defined]
    assert {step: schedule.lr_at(step) for step in steps} == forwards
    values = [forwards[step] for step in range(total)]
    assert all(0 <= value <= 3e-4 * (1 + 1e-12) for value in values)
    rising = values[: schedule.warmup_steps]
    falling = values[schedule.warmup_steps :]
    assert rising == sorted(rising)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(falling))
    assert values[0] > 0


def test_an_unknown_shape_is_told_before_the_first_step() -> None:
    with pytest.raises(ConfigError, match="unknown schedule 'cosin': did you mean 'cosine'"):
        Schedule(1.0, 100, ScheduleConfig(name="cosin"))
