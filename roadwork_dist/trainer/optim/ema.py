"""Exponential moving average of trained weights: torch_ema's, with an fp32 shadow and foreach updates."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch_ema
from torch import Tensor

from roadwork_dist.trainer.config import EmaConfig


class ExponentialMovingAverage(torch_ema.ExponentialMovingAverage):  # type: ignore[misc]
    """fp32 shadow of trained weights, whatever their dtype (complex64 for complex ones).

    ``shadow = d * shadow + (1 - d) * weight`` once per optimizer step, with
    ``d = min(decay, (1 + n) / (10 + n))`` after n updates while warming up (the rule of
    TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``). Element-wise, so a process that
    holds shards of the weights keeps the average of those shards.

    ``average_parameters``, ``store``, ``copy_to``, ``restore`` and ``state_dict`` are torch_ema's. Its own
    shadow has the dtype of the weights; in bf16 it would not move at a decay of 0.9999.

    Args:
        weights: by name; they share memory with the trained parameters and are read at every update.
        config: decay and warm-up.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: EmaConfig) -> None:
        super().__init__([], config.decay)
        self.config = config
        self._names = list(weights)
        # Not weak references as in torch_ema: nothing else holds these views.
        self._weights = [weight.detach() for weight in weights.values()]
        self.shadow_params = [_precise(weight).clone() for weight in self._weights]
        self._is_fp32 = all(weight.dtype == torch.float32 for weight in self._weights)

    def decay_at(self, updates: int) -> float:
        """Decay used by the update that follows ``updates`` earlier ones."""
        if not self.config.warmup:
            return self.config.decay
        return min(self.config.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Move the shadow towards the current weights."""
        current = self._get_parameters(parameters)
        if self.shadow_params:  # a rank may hold no shard at all
            if not self._is_fp32 or parameters is not None:
                current = [_precise(weight.detach()) for weight in current]
            torch._foreach_lerp_(self.shadow_params, current, 1 - self.decay_at(self.num_updates))
        self.num_updates += 1

    def restart(self) -> None:
        """Start again from the current weights."""
        self.num_updates = 0
        for shadow, weight in zip(self.shadow_params, self._weights, strict=True):
            shadow.copy_(weight)

    def shadow(self) -> dict[str, Tensor]:
        """The average in fp32, by the weights' names; shares memory with the shadow."""
        return dict(zip(self._names, self.shadow_params, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a :meth:`state_dict` into the existing shadow, in fp32."""
        self.decay, self.num_updates = state_dict["decay"], state_dict["num_updates"]
        self.collected_params = copy.deepcopy(state_dict["collected_params"])
        for shadow, loaded in zip(self.shadow_params, state_dict["shadow_params"], strict=True):
            shadow.copy_(loaded)

    def _get_parameters(self, parameters: Iterable[Tensor] | None) -> list[Tensor]:
        if parameters is None:
            return self._weights
        found: list[Tensor] = super()._get_parameters(parameters)
        return found


def _precise(weight: Tensor) -> Tensor:
    return weight.to(torch.complex64 if weight.is_complex() else torch.float32)
