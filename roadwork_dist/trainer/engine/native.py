"""Engines that use torch's own gradients and optimizer state: data parallel, and the base of FSDP2."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from roadwork_dist.trainer.config import TrainConfig
from roadwork_dist.trainer.engine.base import Engine, TensorSource, moment_names, trained_parameters
from roadwork_dist.trainer.engine.optimizer_values import Values, load_groups, pack_groups, pack_state, unpack
from roadwork_dist.trainer.engine.precision import in_precision


class NativeEngine(Engine):
    """Backward passes, clipping and optimizer state of plain torch."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, config: TrainConfig
    ) -> None:
        super().__init__(accelerator, model, optimizer, config)
        self._named = trained_parameters(model)

    def backward(self, roots: Sequence[Tensor], factors: Tensor, *, is_last: bool) -> None:
        """The weighted sum is never built: its gradient with respect to each root is the root's factor."""
        torch.autograd.backward(roots, list(factors.unbind()))

    def step(self, lr: float) -> float:
        """Gradients are reduced already, so the norm is the same on all ranks."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = get_total_norm([p.grad for p in trained if p.grad is not None])
        value = self._number(norm)
        if math.isfinite(value):
            if value + 1e-6 > self.max_norm:  # torch's own threshold; a factor of 1 would change nothing
                clip_grads_with_norm_(trained, self.max_norm, norm)
            self.set_lr(lr)
            self.optimizer.step()
        self.forget_gradients()
        return value

    def forget_gradients(self) -> None:
        """Clear the parameters' ``grad``."""
        self.optimizer.zero_grad(set_to_none=True)

    def _number(self, norm: Tensor) -> float:
        return float(norm)

    def moments(self) -> dict[str, Tensor]:
        """Every tensor of the optimizer's state."""
        return self._packed()[0]

    def optimizer_values(self) -> Values:
        """The same on all ranks, since all take the same steps."""
        return {"parameters": self._packed()[1], "groups": pack_groups(self.optimizer, self._groups_at_start)}

    def _packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        values = {
            name: pack_state(self.optimizer.state.get(p, {}), name, p, tensors)
            for name, p in self._named.items()
        }
        return tensors, {name: packed for name, packed in values.items() if packed}

    def load_moments(self, source: TensorSource, prefix: str, values: Values | None) -> None:
        """Create the state that the optimizer's steps would have created, and read it."""
        templates: dict[str, Tensor] = {}
        for name, p in self._named.items():
            packed = {} if values is None else values["parameters"].get(name, {})
            # unpack() calls it before the next iteration.
            state = {
                key: unpack(item, partial(_template, source, prefix, p, templates))
                for key, item in packed.items()
            }
            for key in moment_names(source, prefix, name):
                if f"{prefix}{name}/{key}" not in templates:
                    # A counter is a scalar on the CPU, whatever the shape and device of its parameter.
                    is_counter = key == "step" or source.shapes[f"{prefix}{name}/{key}"] != p.shape
                    dtype = torch.float32 if is_counter else p.dtype
                    state[key] = _template(
                        source, prefix, p, templates, f"{name}/{key}", dtype, not is_counter
                    )
            if state:
                self.optimizer.state[p] = state
        source.read(templates)
        if values is not None:
            load_groups(self.optimizer, values["groups"])


def _template(
    source: TensorSource,
    prefix: str,
    p: Tensor,
    templates: dict[str, Tensor],
    name: str,
    dtype: torch.dtype,
    with_parameter: bool,
) -> Tensor:
    """Zeros to read a tensor of the state of ``p`` into; also added to ``templates``."""
    shape = source.shapes[prefix + name]
    if with_parameter and shape == p.shape:
        made = torch.zeros_like(p, dtype=dtype)  # sharded like the parameter
    else:
        made = torch.zeros(shape, dtype=dtype, device=p.device if with_parameter else "cpu")
    templates[prefix + name] = made
    return made


class Replicated(NativeEngine):
    """The whole model on every process: one process, or DistributedDataParallel on several."""

    name = "replicated"
    offers = frozenset({"whole matrices", "state of other shapes"})

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, config: TrainConfig
    ) -> None:
        super().__init__(accelerator, model, optimizer, config)
        # The optimizer is not wrapped: without a loss scaler Accelerate's wrapper only makes a step slower.
        self.wrapped: nn.Module = accelerator.prepare_model(model)
        self.forward = in_precision(self.wrapped, config.precision, self.device)
        # Ranks may have different numbers of validation batches. The bare model's forward pass contains no
        # collective, unlike the wrapper's (buffers).
        self.evaluate = in_precision(model, config.precision, self.device)

    def accumulate(self) -> AbstractContextManager[Any]:
        """Gradients are not reduced inside."""
        return self.accelerator.no_sync(self.wrapped)  # type: ignore[no-any-return]

    def weights(self) -> dict[str, Tensor]:
        """The parameters themselves."""
        return {name: p.detach() for name, p in self._named.items()}

    def stored(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Unchanged; every rank holds the same."""
        return dict(local)

    def fill(self, local: Mapping[str, Tensor], source: TensorSource, prefix: str) -> None:
        """Read directly into their memory."""
        source.read({prefix + name: tensor for name, tensor in local.items()})
