"""Muon for matrices and AdamW for everything else: torch's implementations in one optimizer.

timm's Muon does both as well, but its steps on FSDP2's shards differ from unsharded ones by 2 to 18 %;
torch's are bit-identical.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from roadwork_dist.trainer.config import OptimConfig
from roadwork_dist.trainer.optim.groups import parameter_groups
from roadwork_dist.trainer.optim.optimizers.base import OPTIMIZERS


class MuonAndAdamW(Optimizer):
    """Steps matrices by Muon and other parameters by AdamW; groups and state are shared with both.

    Args:
        matrices: groups of parameters with two axes; may be empty.
        others: groups of other parameters; may be empty.
        lr: learning rate. Muon's is scaled so that its updates are as large as AdamW's.
        betas: of AdamW.
        eps: of AdamW.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        self._parts: list[Optimizer] = []
        if matrices:
            self._parts.append(torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw"))
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps))
        super().__init__([group for part in self._parts for group in part.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Let both work on the groups and the state of this optimizer, which others change and save."""
        first = 0
        for part in self._parts:
            part.param_groups = self.param_groups[first : first + len(part.param_groups)]
            part.state = self.state
            first += len(part.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, and share its groups and state with both optimizers again."""
        super().load_state_dict(state_dict)
        self._share()


@OPTIMIZERS.register("muon", state_bytes=8, needs=frozenset({"whole matrices"}))
def muon(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for matrices, else AdamW."""
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    matrices = [{**group, "params": [p for p in group["params"] if p.ndim == 2]} for group in groups]
    others = [{**group, "params": [p for p in group["params"] if p.ndim != 2]} for group in groups]
    return MuonAndAdamW(
        [group for group in matrices if group["params"]],
        [group for group in others if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )
