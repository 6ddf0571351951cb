"""Registry of optimizers, and what each of them declares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.registry import Registry
from roadwork_dist.trainer.config import OptimConfig
from roadwork_dist.trainer.engine.base import Engine

Build = Callable[[nn.Module, OptimConfig], Optimizer]
"""(model, settings) -> optimizer over the model's trainable parameters."""

Need = Literal["whole matrices", "state of other shapes", "train and eval modes", "a second backward pass"]
"""What an optimizer may need and not every engine provides.

The whole matrix that a step is computed from, where others need each element alone; state (factors,
preconditioners) that differs in shape from its parameter and so is not sharded; ``train()`` and ``eval()``
around validations and saves (schedule-free ones); a backward pass through the gradient (Sophia-H). No engine
provides the last two so far.
"""


@dataclass(frozen=True, kw_only=True)
class OptimizerEntry:
    """An optimizer that can be chosen by name.

    Attributes:
        build: makes it.
        state_bytes: bytes of state per trained parameter, for the search for the largest batch.
        needs: what an engine has to provide; empty = the optimizer is element-wise.
    """

    build: Build
    state_bytes: int
    needs: frozenset[Need] = frozenset()


class OptimizerRegistry(Registry[OptimizerEntry]):
    """Optimizers by name; a registered function (model, settings) -> optimizer becomes an entry."""

    def register(  # type: ignore[override]
        self, name: str, *, state_bytes: int = 8, needs: frozenset[Need] = frozenset()
    ) -> Callable[[Build], Build]:
        """Decorator that registers a function; see :class:`OptimizerEntry` for the arguments.

        Raises:
            ValueError: the name is taken.
        """

        def add(build: Build) -> Build:
            entry = OptimizerEntry(build=build, state_bytes=state_bytes, needs=needs)
            super(OptimizerRegistry, self).register(name)(entry)
            return build

        return add


OPTIMIZERS = OptimizerRegistry("optimizer")


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The configured optimizer over the trainable parameters of ``model``.

    Raises:
        ConfigError: the name is unknown, or nothing in the model is trainable.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"{type(model).__name__} has no parameter that requires a gradient: nothing would be trained"
        )
    optimizer = OPTIMIZERS[config.name].build(model, config)
    for group in optimizer.param_groups:
        # A group with a learning rate of its own keeps its share of the schedule's.
        group["lr_scale"] = group.get("lr_scale", 1.0) * group["lr"] / config.lr
    return optimizer


def check_needs(config: OptimConfig, engine: type[Engine]) -> None:
    """Refuse an optimizer that an engine does not support.

    Raises:
        ConfigError: something that the optimizer needs is missing.
    """
    missing = sorted(OPTIMIZERS[config.name].needs - engine.offers)
    if missing:
        served = [name for name in OPTIMIZERS if OPTIMIZERS[name].needs <= engine.offers]
        raise ConfigError(
            f"optim.name is {config.name!r}, which needs {' and '.join(missing)}, and the engine "
            f"{engine.name} does not provide that: choose one of {', '.join(served)}, or another engine"
        )
