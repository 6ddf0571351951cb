"""Every optimizer of torch and timm either resumes to the bit or says why it cannot."""

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
from support.engines import train_with
from support.ranks import run
from support.toy import Stop, StopAt, assert_same_tensors, toy_config, toy_data, weights
from timm.optim import list_optimizers
from torch import nn
from torch.optim import Optimizer

from roadwork_dist import EmaConfig, OptimConfig, TrackingConfig, Trainer
from roadwork_dist.common.errors import CheckpointError, ConfigError
from roadwork_dist.trainer.optim.optimizers import OPTIMIZERS

Build = Callable[[nn.Module], Optimizer]

# LBFGS wants a closure; SparseAdam sparse gradients; Adahessian a second backward pass.
_OTHER_LOOPS = {"LBFGS", "SparseAdam", "adahessian"}


def of_torch() -> Iterator[tuple[str, Build]]:
    for name, kind in vars(torch.optim).items():
        if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer:
            if name == "Muon":
                yield (
                    name,
                    lambda model, kind=kind: kind([p for p in model.parameters() if p.ndim == 2], lr=1e-2),
                )
            elif name not in _OTHER_LOOPS:
                yield name, lambda model, kind=kind: kind(model.parameters(), lr=1e-2)


def of_timm() -> Iterator[tuple[str, Build]]:
    for name in list_optimizers():
        # apex and bitsandbytes compute on GPUs only.
        if name not in _OTHER_LOOPS and not name.startswith(("fused", "bnb")):
            yield (
                f"timm {name}",
                lambda model, name=name: timm.optim.create_optimizer_v2(
                    model, opt=name, lr=1e-2, weight_decay=0.01
                ),
            )


BUILDS = dict(itertools.chain(of_torch(), of_timm()))


def model_of() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 2)
    )


def fit(run_dir: Path, *callbacks: Any, name: str = "under test", batch_size: int = 64) -> Trainer:
    config = toy_config(
        run_dir,
        epochs=1,
        batch_size=batch_size,
        optim=OptimConfig(name=name, lr=0.01),
        ema=EmaConfig(enabled=False),
        tracking=TrackingConfig(progress=False),
    )
    return Trainer(model_of(), config, toy_data(512), callbacks=callbacks, task=None).fit()


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")  # timm's kron
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_a_stopped_run_ends_like_an_undisturbed_one(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OPTIMIZERS, "_items", dict(OPTIMIZERS._items))
    OPTIMIZERS.register("under test")(lambda model, config: build(model))
    undisturbed = weights(fit(tmp_path / "undisturbed"))
    with pytest.raises(Stop):
        fit(tmp_path / "stopped", StopAt(5))
    trainer = fit(tmp_path / "stopped")
    assert trainer.state.step == 8
    assert_same_tensors(weights(trainer), undisturbed)


class Strange(torch.optim.SGD):
    """Keeps a function in its state."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["rule"] = max
        super().step()


def test_state_that_cannot_be_saved_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPTIMIZERS, "_items", dict(OPTIMIZERS._items))
    OPTIMIZERS.register("under test")(lambda model, config: Strange(model.parameters(), lr=0.1))
    with pytest.raises(
        CheckpointError, match=r"keeps a builtin_function_or_method in its state \(0.weight/rule\)"
    ):
        fit(tmp_path)


def weights_by(run_dir: Path, name: str) -> dict[str, torch.Tensor]:
    """Whole weights after training with half the rows on each of two ranks, the same after a stop."""
    undisturbed = fit(run_dir / "undisturbed", name=name, batch_size=32).engine.whole_state()
    with pytest.raises(Stop):
        fit(run_dir / "stopped", StopAt(5), name=name, batch_size=32)
    resumed = fit(run_dir / "stopped", name=name, batch_size=32).engine.whole_state()
    assert_same_tensors(resumed, undisturbed)
    return resumed


ELEMENT_WISE = [name for name in OPTIMIZERS if not OPTIMIZERS[name].needs]
SERVED = [
    *((engine, name) for engine in ("ddp", "fsdp2") for name in OPTIMIZERS),
    *((engine, name) for engine in ("zero1", "zero3") for name in ELEMENT_WISE),
]


@pytest.mark.parametrize(("engine", "name"), SERVED, ids=["-".join(each) for each in SERVED])
def test_engines_serve_what_an_optimizer_needs(engine: str, name: str, tmp_path: Path) -> None:
    expected = weights(fit(tmp_path / "one", name=name))
    found = run(train_with, engine, weights_by, tmp_path, name, world_size=2)[0]
    first = model_of().state_dict()
    # Muon orthogonalises in bf16, so the last bit of a sum shows. Shards that are taken for whole matrices
    # are off by a third.
    tolerance = 0.05 if (engine, name) == ("fsdp2", "muon") else 1e-3
    for key, tensor in expected.items():
        moved = (tensor - first[key]).norm()
        assert (found[key] - tensor).norm() <= tolerance * moved, key


def refusal(run_dir: Path, name: str) -> str:
    with pytest.raises(ConfigError) as refused:
        fit(run_dir, name=name)
    return str(refused.value)


@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_an_engine_that_cannot_serve_an_optimizer_refuses_it_at_the_start(name: str, tmp_path: Path) -> None:
    for told in run(train_with, "zero2", refusal, tmp_path, name, world_size=2):
        assert (
            f"optim.name is {name!r}, which needs whole matrices, and the engine zero does not provide that"
            in told
        )
        choices = re.search(r"choose one of (.*), or another engine", told)
        assert choices
        assert set(choices[1].split(", ")) == set(ELEMENT_WISE)
    assert not list(tmp_path.iterdir())


class Counting(torch.optim.SGD):
    """Counts its steps in the parameter group, as timm's Adan and LAMB do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        super().step()


def counted(run_dir: Path) -> str:
    OPTIMIZERS.register("under test")(lambda model, config: Counting(model.parameters(), lr=config.lr))
    try:
        trainer = fit(run_dir, batch_size=32)
    except ConfigError as error:
        return str(error)
    return str(trainer.optimizer.param_groups[0]["step"])


def test_a_counter_in_a_group_is_right_or_refused(tmp_path: Path) -> None:
    assert run(train_with, "zero1", counted, tmp_path / "one", world_size=2) == ["8", "8"]
    for told in run(train_with, "zero3", counted, tmp_path / "three", world_size=2):
        assert "changes step of its parameter groups in a step" in told
