"""Optimizer, gradients and parameters partitioned over ranks by DeepSpeed ZeRO 1, 2, 3.

ZeRO (arXiv 1910.02054) keeps flat fp32 partitions. A rank holds one contiguous fragment of each flattened
parameter, or none (stages 1 and 2 split the concatenation of all parameters, stage 3 each one).
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from roadwork_dist.common.errors import CheckpointError, ConfigError
from roadwork_dist.trainer.config import TrainConfig
from roadwork_dist.trainer.engine.base import (
    Engine,
    TensorSource,
    lay_out_contiguously,
    moment_names,
    trained_parameters,
)
from roadwork_dist.trainer.engine.optimizer_values import (
    Values,
    load_groups,
    pack,
    pack_groups,
    snapshot,
    unpack,
)


@dataclass(frozen=True)
class _Fragment:
    """Position of a rank's part of a parameter.

    Attributes:
        flat: partition of many parameters; the key of the optimizer's state.
        offset: of the fragment in ``flat``, in elements.
        start: of the fragment in the flattened parameter, in elements.
        length: elements of the parameter, without the padding of the last rank in stage 3.
    """

    flat: Tensor
    offset: int
    start: int
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """The same fragment of a tensor laid out like ``flat``."""
        return flat.narrow(0, self.offset, self.length)


class Zero(Engine):
    """DeepSpeed's engine, driven by the Trainer.

    The Trainer controls accumulation, learning rate and the decision to skip. Gradients are means over ranks
    of sums over micro-batches, as in data parallel training.
    """

    name = "zero"

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, config: TrainConfig
    ) -> None:
        super().__init__(accelerator, model, optimizer, config)
        names = trained_parameters(model)
        self.shapes = {name: p.shape for name, p in names.items()}  # stage 3 empties the parameters
        logging.getLogger("DeepSpeed").setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "WARNING").upper())
        _fill(accelerator.state.deepspeed_plugin.deepspeed_config, config)
        lay_out_contiguously(model)
        self.deepspeed: Any = accelerator.prepare(model, optimizer)[0]
        self.partitions: Any = self.deepspeed.optimizer
        self._groups_at_start = snapshot(optimizer)  # with what DeepSpeed adds
        self.stage = int(self.deepspeed.zero_optimization_stage())
        self.lockstep = self.stage == 3  # type: ignore[misc]
        self._named = names
        self._fragments = {name: s for name, p in names.items() if (s := self._fragment(p)) is not None}
        self.forward = self.deepspeed
        self.evaluate = self.deepspeed

    def backward(self, roots: Sequence[Tensor], factors: Tensor, *, is_last: bool) -> None:
        """DeepSpeed takes one scalar."""
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        total = sum(root * factor for root, factor in zip(roots, factors.unbind(), strict=True))
        self.deepspeed.backward(total, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """DeepSpeed clips, steps, and skips a step whose norm is not finite."""
        self.set_lr(lr)
        self.deepspeed.step()
        if self.stage == 3:
            self._refuse_counters_of_groups()
        return float(self.deepspeed.get_global_grad_norm())

    def _refuse_counters_of_groups(self) -> None:
        """Stage 3 steps one partition after the other, and each time the optimizer goes over all groups."""
        packed = pack_groups(self.optimizer, self._groups_at_start)
        changed = sorted({key for group in packed for key in group})
        if changed:
            raise ConfigError(
                f"{type(self.optimizer).__name__} changes {', '.join(changed)} of its parameter groups in a "
                "step, which ZeRO-3 makes it do once for every partition: choose another optimizer or engine"
            )

    def forget_gradients(self) -> None:
        """Clear those of the working copy; DeepSpeed overwrites the optimizer's own in its buffers."""
        self.deepspeed.zero_grad()

    def _fragment(self, p: Tensor) -> _Fragment | None:
        if self.stage == 3:
            group, offset, padded = self.partitions.grad_position[self.partitions.get_param_id(p)]
            start = padded * dist.get_rank()
            length = max(0, min(padded, p.ds_numel - start))  # type: ignore[attr-defined]
            flat = self.partitions.fp32_partitioned_groups_flat[group]
            return _Fragment(flat, offset, start, length) if length else None
        mapping = p._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = self.partitions.single_partition_of_fp32_groups[mapping.param_group_index]
        place, address = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Fragment(flat, place.start, address.start, address.numel)

    def weights(self) -> dict[str, Tensor]:
        """This rank's fragments of the fp32 weights."""
        return {name: s.of(s.flat.detach()) for name, s in self._fragments.items()}

    @torch.no_grad()
    def weights_changed(self) -> None:
        """Update the working copies from the fp32 partitions."""
        if self.stage == 3:
            for name, s in self._fragments.items():
                self._named[name].ds_tensor.view(-1)[: s.length].copy_(s.of(s.flat))  # type: ignore[attr-defined]
            self.deepspeed.empty_partition_cache()  # weights that a forward pass gathered and still holds
            kept = self.partitions.persistent_parameters  # small ones, whole on every rank
            if kept:
                for p in kept:
                    p.partition()
                kept[0].all_gather(kept)
            return
        local = self.weights()
        for name, p in self._named.items():
            p.copy_(self._whole(name, local))

    def _whole(self, name: str, local: Mapping[str, Tensor]) -> Tensor:
        """The full tensor on every rank: the sum of the ranks' fragments, which do not overlap."""
        shape = self.shapes[name]
        full = torch.zeros(shape.numel(), device=self.device)
        if name in local:
            s = self._fragments[name]
            full.narrow(0, s.start, s.length).copy_(local[name])
        dist.all_reduce(full)
        return full.view(shape)

    def stored(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU, assigned to ranks round-robin: each rank writes its share."""
        mine = {}
        for number, name in enumerate(self._named):
            full = self._whole(name, local)  # every rank, in the same order
            if number % self.processes == self.accelerator.process_index:
                mine[name] = full.cpu()
        return mine

    @torch.no_grad()
    def fill(self, local: Mapping[str, Tensor], source: TensorSource, prefix: str) -> None:
        """Read whole tensors one at a time, so only one is in memory."""
        for name, shape in self.shapes.items():
            full = torch.empty(shape)
            source.read({prefix + name: full})
            if name in local:
                s = self._fragments[name]
                local[name].copy_(full.view(-1).narrow(0, s.start, s.length))

    def _state(self, key: str) -> dict[str, Tensor]:
        """Fragments of a moment, created as zeros where the optimizer has not created it yet."""
        found = {}
        for name, s in self._fragments.items():
            state = self.optimizer.state[s.flat]
            if key not in state:
                state[key] = torch.zeros_like(s.flat)
            found[name] = s.of(state[key])
        return found

    def _keys(self) -> list[str]:
        """The optimizer's moments on all ranks; ``step`` is a counter, the others are like parameters."""
        states = self.optimizer.state.values()
        keys = {key for state in states for key, value in state.items() if isinstance(value, Tensor)}
        for flat, state in self.optimizer.state.items():
            for key in keys & state.keys() - {"step"}:
                if state[key].shape != flat.shape:
                    raise CheckpointError(
                        f"the optimizer keeps {key} of shape {tuple(state[key].shape)} for a partition of "
                        f"{tuple(flat.shape)}: ZeRO supports only element-wise optimizers, choose one of them"
                    )
        gathered: list[set[str]] = [set()] * self.processes
        dist.all_gather_object(gathered, keys)
        return sorted(set().union(*gathered))

    def moments(self) -> dict[str, Tensor]:
        """Moments as whole tensors, each on the rank that writes it."""
        keys = self._keys()
        found: dict[str, Tensor] = {}
        for key in keys:
            if key != "step":
                found |= {f"{name}/{key}": t for name, t in self.stored(self._state(key)).items()}
        if "step" in keys:
            # All parameters have taken equally many steps: a ZeRO partition steps as a whole.
            steps = [float(state["step"]) for state in self.optimizer.state.values() if "step" in state]
            gathered = [0.0] * self.processes
            dist.all_gather_object(gathered, max(steps, default=0.0))
            found |= {f"{name}/step": torch.tensor(max(gathered)) for name in self._named}
        return found

    def optimizer_values(self) -> Values:
        """Non-tensor state of a partition, for each parameter in it, and the groups' entries."""
        own: dict[str, dict[str, Any]] = {}
        for name, s in self._fragments.items():
            state = self.optimizer.state.get(s.flat, {})
            values = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            if values:
                own[name] = {
                    key: pack(value, f"{name}/{key}", {}, self.device) for key, value in values.items()
                }
        gathered: list[dict[str, dict[str, Any]]] = [{}] * self.processes
        dist.all_gather_object(gathered, own)
        parameters = {name: values for share in gathered for name, values in share.items()}
        return {"parameters": parameters, "groups": pack_groups(self.optimizer, self._groups_at_start)}

    def load_moments(self, source: TensorSource, prefix: str, values: Values | None) -> None:
        """Create the state that the optimizer's steps would have created, and read it."""
        if values is not None:
            load_groups(self.optimizer, values["groups"])
            for name, s in self._fragments.items():
                for key, packed in values["parameters"].get(name, {}).items():
                    self.optimizer.state[s.flat][key] = unpack(packed, _no_tensor)
        keys = sorted({key for name in self._named for key in moment_names(source, prefix, name)})
        for key in keys:
            if key != "step":
                self.fill(self._state(key), _Moment(source, key), prefix)
        if "step" in keys:
            counters = {f"{prefix}{name}/step": torch.zeros(()) for name in self._named}
            counters = {name: t for name, t in counters.items() if name in source.shapes}
            source.read(counters)
            count = torch.stack(list(counters.values())).max()
            for s in self._fragments.values():
                self.optimizer.state[s.flat]["step"] = count.clone()

    def held(self, tensor: Tensor) -> Tensor:
        """Stage 3 empties parameters and keeps a part of each in ``ds_tensor``."""
        part: Tensor = getattr(tensor, "ds_tensor", tensor)
        return part.detach()

    @torch.no_grad()
    def put_whole(self, tensor: Tensor, whole: Tensor) -> None:
        """Gather the parameter, and let rank 0's values be dealt out again."""
        from deepspeed.runtime.zero import GatheredParameters

        held = [tensor] if hasattr(tensor, "ds_id") else []
        with GatheredParameters(held, modifier_rank=0, enabled=bool(held)):
            tensor.copy_(whole)

    @contextmanager
    def _gathered(self, tensor: Tensor) -> Iterator[Tensor]:
        from deepspeed.runtime.zero import GatheredParameters

        held = [tensor] if hasattr(tensor, "ds_id") else []
        with GatheredParameters(held, enabled=bool(held)):
            yield tensor


def _no_tensor(name: str, dtype: torch.dtype, with_parameter: bool) -> Tensor:
    raise CheckpointError(
        f"the checkpoint's optimizer state has a tensor {name} that does not match its parameter, which ZeRO "
        "does not support: resume under the engine that wrote it"
    )


def _fill(deepspeed: dict[str, Any], config: TrainConfig) -> None:
    """Set what DeepSpeed's configuration leaves to the experiment (``auto``)."""
    deepspeed |= {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.optim.clip,
        # Allow any element-wise optimizer, and use torch's on the CPU too, so that a step is the same with
        # and without offload.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": config.precision != "fp32",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # gather weights and reduce gradients in fp32
        },
    }
    deepspeed.pop("train_batch_size", None)  # micro-batch x accumulation x ranks
    zero = deepspeed["zero_optimization"]
    # "auto" would be derived from the hidden size of a language model's configuration.
    for key, value in _ZERO_SIZES.items():
        if zero.get(key) == "auto":
            zero[key] = value


_ZERO_SIZES = {
    "reduce_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 10_000,
}
"""Elements; smaller than DeepSpeed's own (5e8), whose buffers would be larger than the head."""


@dataclass(frozen=True)
class _Moment:
    """One moment of every parameter, under the parameters' names; zeros where a checkpoint lacks it."""

    source: TensorSource
    key: str

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        end = f"/{self.key}"
        return {n.removesuffix(end): shape for n, shape in self.source.shapes.items() if n.endswith(end)}

    def read(self, into: dict[str, Tensor]) -> None:
        there = {f"{n}/{self.key}": t for n, t in into.items() if f"{n}/{self.key}" in self.source.shapes}
        for name in into.keys() - {n.removesuffix(f"/{self.key}") for n in there}:
            into[name].zero_()  # a parameter that had no gradient before the checkpoint was saved
        self.source.read(there)
