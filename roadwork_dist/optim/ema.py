"""Exponential moving average of trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from roadwork_dist.config.schema import EmaConfig


class ExponentialMovingAverage:
    """fp32 shadow of a model's trainable parameters, whatever their dtype.

    ``shadow = d * shadow + (1 - d) * parameter`` once per optimizer step, with
    ``d = min(decay, (1 + n) / (10 + n))`` after n updates while warming up (the rule of
    TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``).

    Args:
        model: its parameters are read at every update; names are those of ``named_parameters``.
        config: decay and warm-up.
    """

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self.config = config
        self.updates = 0
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names = list(named)
        self._parameters: list[Tensor] = list(named.values())
        self._shadow = [p.detach().float().clone() for p in self._parameters]
        self._is_fp32 = all(p.dtype == torch.float32 for p in self._parameters)

    def decay_at(self, updates: int) -> float:
        """Decay used by the update that follows ``updates`` earlier ones."""
        if not self.config.warmup:
            return self.config.decay
        return min(self.config.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self) -> None:
        """Move the shadow towards the parameters as they are now."""
        weight = 1 - self.decay_at(self.updates)
        current = self._parameters if self._is_fp32 else [p.float() for p in self._parameters]
        torch._foreach_lerp_(self._shadow, current, weight)
        self.updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run a block with the averaged weights inside the model."""
        held = [p.detach().clone() for p in self._parameters]
        self._set(self._shadow)  # copied: bf16 parameters must not round the shadow itself
        try:
            yield
        finally:
            self._set(held)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The shadow by parameter name (fp32), and the number of updates."""
        return {
            **dict(zip(self._names, self._shadow, strict=True)),
            "__updates__": torch.tensor(self.updates),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take a shadow over.

        Raises:
            KeyError: a parameter of the model is not in ``state``.
        """
        self.updates = int(state["__updates__"])
        for name, shadow in zip(self._names, self._shadow, strict=True):
            shadow.copy_(state[name])
