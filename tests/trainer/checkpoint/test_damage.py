"""Checkpoints of real runs, cut short or with flipped bits at any byte."""

import logging
import random
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.ranks import run
from support.toy import (
    Stop,
    StopAt,
    assert_same_tensors,
    lines,
    newest_tensors,
    toy_config,
    toy_data,
    toy_model,
)

from roadwork_dist.common.errors import CheckpointError
from roadwork_dist.trainer.checkpoint.checkpoint_store import CheckpointStore, verify
from roadwork_dist.trainer.config import CheckpointConfig
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.trainer import Trainer


def train(run_dir: Path, *callbacks: Callback) -> None:
    config = toy_config(run_dir, batch_size=8, checkpoint=CheckpointConfig(every_steps=2))
    with suppress(Stop):
        Trainer(toy_model(0.3), config, toy_data(48), toy_data(9), callbacks=callbacks).fit()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks have saved behind steps 2 and 3."""
    folder = tmp_path_factory.mktemp("trained")
    run(train, folder, StopAt(4), world_size=2)
    return folder


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ (1 << position % 8)]) + content[position + 1 :]


def cut(content: bytes, position: int) -> bytes:
    return content[:position]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_bit_or_cut_is_found(trained: Path, data: st.DataObject) -> None:
    folder = CheckpointStore(trained / "checkpoints").path(3)
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "state.json", "rng-00001.pt"} <= set(names)
    path = folder / data.draw(st.sampled_from(names))
    damaged = data.draw(st.sampled_from([flip, cut]))
    content = path.read_bytes()
    try:
        path.write_bytes(damaged(content, data.draw(st.integers(0, len(content) - 1))))
        with pytest.raises(CheckpointError, match=path.name):
            verify(folder)
    finally:
        path.write_bytes(content)
    verify(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_manifest_is_found_or_says_the_same(trained: Path, data: st.DataObject) -> None:
    store = CheckpointStore(trained / "checkpoints")
    path = store.path(3) / "manifest.json"
    content = path.read_bytes()
    try:
        path.write_bytes(flip(content, data.draw(st.integers(0, len(content) - 1))))
        assert store.newest() in (store.path(2), store.path(3))  # a changed blank changes nothing
        path.write_bytes(cut(content, data.draw(st.integers(0, len(content) - 1))))
        assert store.newest() == store.path(2)
    finally:
        path.write_bytes(content)


def resume(run_dir: Path) -> list[str]:
    """Go on, and what was warned of on the way."""
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    logging.getLogger("roadwork_dist.trainer.checkpoint").addHandler(Listener(level=logging.WARNING))
    train(run_dir)
    return told


@pytest.mark.parametrize("seed", range(3))
def test_a_run_goes_on_from_the_one_before(trained: Path, seed: int, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "whole")
    shutil.copytree(trained, tmp_path / "damaged")
    newest = CheckpointStore(tmp_path / "damaged" / "checkpoints").path(3)
    draw = random.Random(seed)
    path = draw.choice(sorted(newest.iterdir()))
    damage: Any = draw.choice([flip, cut])
    if path.name == "manifest.json":
        damage = cut
    path.write_bytes(damage(path.read_bytes(), draw.randrange(path.stat().st_size)))

    told = run(resume, tmp_path / "damaged", world_size=2)
    assert len(told[0]) == 1  # one line, by one rank
    assert "step-00000003" in told[0][0]
    assert "kept as step-00000003.damaged, trying the one before it" in told[0][0]
    assert told[1] == []
    assert (newest.parent / "step-00000003.damaged" / path.name).exists()
    run(resume, tmp_path / "whole", world_size=2)
    assert lines(tmp_path / "damaged") == lines(tmp_path / "whole")
    assert_same_tensors(newest_tensors(tmp_path / "damaged"), newest_tensors(tmp_path / "whole"))
