"""Saving and loading the state of callbacks in a checkpoint, each under its own key."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.trainer.engine.base import PrefixedSource, TensorSource
from roadwork_dist.trainer.events.callback import Callback

logger = logging.getLogger(__name__)


def key_of(callback: Callback) -> str:
    """The key of a callback's state in checkpoints."""
    return callback.key or type(callback).__name__


def by_key(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Callbacks that have state, by key.

    Raises:
        ConfigError: two of them have the same key.
    """
    found: dict[str, Callback] = {}
    for callback in callbacks:
        kind = type(callback)
        if kind.state_dict is Callback.state_dict and kind.tensors is Callback.tensors:
            continue
        other = found.setdefault(key_of(callback), callback)
        if other is not callback:
            raise ConfigError(
                f"two callbacks, {type(other).__name__} and {kind.__name__}, keep their state under the key "
                f"{key_of(callback)!r}, expected different keys: give one of them another `key`"
            )
    return found


def state_dicts(callbacks: Sequence[Callback]) -> dict[str, dict[str, Any]]:
    """JSON-serializable state of every callback that has state, by key."""
    return {key: callback.state_dict() for key, callback in by_key(callbacks).items()}


def load_state_dicts(callbacks: Sequence[Callback], saved: dict[str, dict[str, Any]]) -> None:
    """Load state; warns about state without a callback and about callbacks without state."""
    left, missing = dict(saved), []
    for key, callback in by_key(callbacks).items():
        names = [name for name in (key, *callback.former_keys) if name in left]
        if names:
            callback.load_state_dict(left.pop(names[0]))
        else:
            missing.append(key)
    # Version 0.1 also listed callbacks without state, with an empty entry.
    known = {key_of(callback) for callback in callbacks}
    unclaimed = [key for key, state in left.items() if state and key not in known]
    if unclaimed:
        logger.warning(
            "the checkpoint holds state of callbacks that this run does not have; the next checkpoint will "
            "not contain it: %s; if a callback was renamed, list its old key in `former_keys`",
            ", ".join(unclaimed),
        )
    if missing:
        logger.warning("the checkpoint holds no state of %s: starting without it", ", ".join(missing))


def tensors(callbacks: Sequence[Callback]) -> dict[str, Tensor]:
    """Tensors of every callback, by ``key/name``."""
    return {
        f"{key}/{name}": tensor
        for key, callback in by_key(callbacks).items()
        for name, tensor in callback.tensors().items()
    }


def load_tensors(callbacks: Sequence[Callback], source: TensorSource) -> None:
    """Load :func:`tensors`, or call ``on_no_tensors`` if a callback has none in the source. A collective."""
    for key, callback in by_key(callbacks).items():
        for name in (key, *callback.former_keys):
            own = PrefixedSource(f"{name}/", source)
            if own.shapes:
                callback.load_tensors(own)
                break
        else:
            callback.on_no_tensors()
