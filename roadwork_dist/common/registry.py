"""A typed registry from names to implementations; an unknown name raises an error that lists the choices."""

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Generic, TypeVar

from roadwork_dist.common.errors import ConfigError

T = TypeVar("T")


def nearest(word: str, choices: list[str], n: int = 3) -> list[str]:
    """Up to ``n`` choices most similar to ``word``, best first; never empty if there are choices."""
    return get_close_matches(word, choices, n=n, cutoff=0.0)


class Registry(Generic[T]):
    """A family of implementations by name (losses, optimizers, backbones, …).

    Args:
        kind: what is registered, for messages, for example ``"optimizer"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that registers an object under ``name``.

        Raises:
            ValueError: the name is already registered.
        """

        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        """The implementation registered as ``name``.

        Raises:
            ConfigError: the name is unknown; the message lists the choices.
        """
        if name not in self._items:
            close = nearest(name, list(self._items), n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(f"unknown {self.kind} {name!r}: {hint}choose one of {', '.join(self._items)}")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)


def import_modules(package: str, path: Iterable[str], first: Iterable[str] = ()) -> None:
    """Import every module of a package, so that what they register is there.

    Args:
        package: its ``__name__``.
        path: its ``__path__``.
        first: modules to import before the others, which follow in alphabetical order.
    """
    for name in dict.fromkeys((*first, *(module.name for module in iter_modules(path)))):
        import_module(f"{package}.{name}")
