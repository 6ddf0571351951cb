"""What forward passes and callbacks change in a model besides the weights that learn.

Such are frozen parameters (momentum encoders, mean teachers), buffers that are not persistent or of parts in
eval mode, and tensors that are plain attributes. Each goes into a checkpoint once it is not what the run
started with. Every checkpoint also holds modules' extra state and their random generators.
"""

import io
import logging
import random
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from roadwork_dist.common.errors import CheckpointError, ConfigError
from roadwork_dist.common.undisturbed import write_buffer
from roadwork_dist.trainer.checkpoint.tensors import StoredTensors
from roadwork_dist.trainer.engine.base import Engine
from roadwork_dist.trainer.engine.collectives import gather_objects, rank

logger = logging.getLogger(__name__)

PREFIX = "untrained/"
"""Of the names of these tensors in a checkpoint."""

Generator = torch.Generator | np.random.Generator | random.Random


@dataclass(frozen=True)
class _Place:
    """An attribute of a module that holds a tensor."""

    module: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = getattr(self.module, self.attribute)
        return tensor


class ModuleState:
    """Finds and keeps the changing state of a model that its trained tensors leave out.

    Args:
        model: on its processes.
        engine: the model's.
        trained: names of the parameters and buffers that every checkpoint holds anyway.

    Raises:
        ConfigError: a module's extra state cannot be saved.
    """

    def __init__(self, model: nn.Module, engine: Engine, trained: Collection[str]) -> None:
        self.model, self.engine = model, engine
        self._places = {name: place for name, place in _places(model) if name not in trained}
        self._at_start = {name: self._digest(place) for name, place in self._places.items()}
        self._reported: set[str] = set()
        _check_extra_state(model)

    def parameters(self) -> dict[str, Tensor]:
        """Frozen parameters that have changed, whole, on the main process; all ranks call it together."""
        changed = [name for name in self._changed() if self._is_parameter(name)]
        # Every rank gets here: a parameter may have changed in the shard of one of them only.
        names = sorted({name for found in gather_objects(changed) for name in found})
        self._report(names)
        whole = self.engine.whole_state(names) if names else {}
        return {PREFIX + name: tensor for name, tensor in whole.items()}

    def load_parameters(self, source: StoredTensors) -> None:
        """Put the frozen parameters of a checkpoint back; all ranks call it together.

        Raises:
            CheckpointError: the model has no such parameter.
        """
        for stored in sorted(name for name in source.shapes if name.startswith(PREFIX)):
            place = self._place(stored.removeprefix(PREFIX), str(source.folder))
            self.engine.put_whole(place.tensor, source.whole(stored))

    def _changed(self) -> list[str]:
        return [name for name, place in self._places.items() if self._digest(place) != self._at_start[name]]

    def _is_parameter(self, name: str) -> bool:
        return isinstance(self._places[name].tensor, nn.Parameter)

    def _place(self, name: str, where: str) -> _Place:
        if name not in self._places:
            raise CheckpointError(
                f"{where} holds {name}, which the run changed and this model does not have: use the model "
                "that the run was started with, or another output_dir"
            )
        return self._places[name]

    def _report(self, names: Collection[str]) -> None:
        new = [name for name in names if name not in self._reported]
        self._reported.update(new)
        if new and rank() == 0:
            logger.info("changed without a gradient, so checkpoints hold them as well: %s", ", ".join(new))

    def objects(self) -> dict[str, Any]:
        """State of this process's model that is no parameter, in types that ``torch.load`` reads safely.

        Tensors that ranks may have different ones of, extra state and generators.
        """
        names = [name for name in self._changed() if not self._is_parameter(name)]
        self._report(names)
        return {
            "tensors": {name: self._places[name].tensor.detach().cpu().clone() for name in names},
            "extra": dict(_extra_states(self.model)),
            "generators": {name: _state_of(generator) for name, generator in _generators(self.model)},
        }

    def load_objects(self, own: dict[str, Any] | None, main: dict[str, Any]) -> None:
        """Take :meth:`objects` over.

        Args:
            own: of this rank; None = there was no such rank: it takes all but generators from ``main``.
            main: of the main process.

        Raises:
            CheckpointError: the model lacks a tensor.
        """
        state = main if own is None else own
        for name, tensor in state.get("tensors", {}).items():
            place = self._place(name, "the checkpoint")
            write_buffer(place.module, place.attribute, tensor.to(place.tensor.device))
        modules = dict(self.model.named_modules())
        for name, extra in state.get("extra", {}).items():
            if name in modules:
                modules[name].set_extra_state(extra)
        for name, generator in _generators(self.model):
            saved = None if own is None else own.get("generators", {}).get(name)
            if saved is not None:
                _set_state(generator, saved)

    def _digest(self, place: _Place) -> tuple[object, ...]:
        tensor = self.engine.held(place.tensor)
        if tensor.device.type != "cpu" and isinstance(place.tensor, nn.Parameter):
            content = int(torch.hash_tensor(tensor))  # where it is: a frozen backbone is large
        else:
            # A copy: what numpy has looked at cannot be resized any more, as FSDP2 resizes gathered weights.
            flat = tensor.detach().to("cpu", copy=True).contiguous().reshape(-1)
            content = zlib.crc32(flat.view(torch.uint8).numpy().data)
        return tuple(tensor.shape), tensor.dtype, content


def _places(model: nn.Module) -> Iterator[tuple[str, _Place]]:
    """Parameters without gradient, buffers and tensors that are plain attributes, each once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        own = {**module._parameters, **module._buffers, **vars(module)}
        for attribute, value in own.items():
            if isinstance(value, Tensor) and not value.requires_grad and id(value) not in seen:
                seen.add(id(value))
                yield f"{prefix}.{attribute}".removeprefix("."), _Place(module, attribute)


def _extra_states(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield name, module.get_extra_state()


def _check_extra_state(model: nn.Module) -> None:
    """Write and read it once, so that a run does not learn at its first save that it cannot be resumed."""
    for name, state in _extra_states(model):
        file = io.BytesIO()
        try:
            torch.save(state, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception as error:  # pickle and torch raise many kinds
            raise ConfigError(
                f"the extra state of the module {name or type(model).__name__!r} is a {type(state).__name__} "
                "that a checkpoint cannot hold, expected tensors, numbers, texts, lists or dicts of them: "
                "let its get_extra_state() return those"
            ) from error


def _generators(model: nn.Module) -> Iterator[tuple[str, Generator]]:
    for prefix, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Generator):
                yield f"{prefix}.{attribute}".removeprefix("."), value


def _state_of(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return _without_arrays(generator.bit_generator.state)


def _set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        version, internal, gauss = state
        generator.setstate((version, tuple(internal), gauss))
    else:
        generator.bit_generator.state = _with_arrays(state)


def _without_arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_arrays(item) for key, item in value.items()}
    return {"dtype": str(value.dtype), "values": value.tolist()} if isinstance(value, np.ndarray) else value


def _with_arrays(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"dtype", "values"}:
        return np.array(value["values"], dtype=value["dtype"])
    return {key: _with_arrays(item) for key, item in value.items()} if isinstance(value, dict) else value
