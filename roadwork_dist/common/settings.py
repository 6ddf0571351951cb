"""Dataclasses of settings whose values are checked against their types where they are made."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from os import PathLike, fspath
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from roadwork_dist.common.errors import ConfigError

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def settings(group: str = "") -> Callable[[type[T]], type[T]]:
    """Decorator that makes a frozen dataclass of keyword arguments, and refuses values of another type.

    Values are checked before ``__post_init__``, which checks ranges. numpy's scalars are taken as Python's,
    and paths as texts.

    Args:
        group: dotted name of the settings, for messages; empty = they belong to no group.
    """

    def decorate(cls: type[T]) -> type[T]:
        check_ranges = vars(cls).get("__post_init__")

        def check(self: Any) -> None:
            _check_types(self, group)
            if check_ranges is not None:
                check_ranges(self)

        cls.__post_init__ = check  # type: ignore[attr-defined]
        return dataclass(frozen=True, kw_only=True)(cls)

    return decorate


def _check_types(config: Any, group: str) -> None:
    """Check every field.

    Raises:
        ConfigError: a value has another type, or is none of the choices.
    """
    hints = get_type_hints(type(config))
    for item in fields(config):
        value = getattr(config, item.name)
        if hasattr(value, "dtype") and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
            value = value.item()
            object.__setattr__(config, item.name, value)  # frozen, but not yet made
        if isinstance(value, PathLike) and hints[item.name] in (str, str | None):
            value = fspath(value)
            object.__setattr__(config, item.name, value)
        if not _fits(value, hints[item.name]):
            name = f"{group}.{item.name}" if group else item.name
            raise ConfigError(f"{name} is {value!r}, expected {_in_words(hints[item.name])}")


def _fits(value: Any, hint: Any) -> bool:
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    # A bool is an int for Python, and 1 == True for Literal: neither is what somebody means.
    if (
        isinstance(value, bool)
        and bool not in options
        and not any(value is c for o in options for c in get_args(o))
    ):
        return False
    try:
        check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        return False
    return True


def _in_words(hint: Any) -> str:
    """A type for a message: ``'fp32', 'bf16' or 'fp8'``, ``a whole number or null``, ``a number``, …."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        words = [_in_words(argument) for argument in arguments]
    elif origin is Literal:
        words = [repr(argument) for argument in arguments]
    else:
        simple = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "a text",
            NoneType: "null",
        }
        words = [simple.get(hint, getattr(hint, "__name__", str(hint)) if origin is None else str(hint))]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
