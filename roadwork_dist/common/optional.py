"""Guarded imports of packages that only some users need."""

from importlib import import_module
from types import ModuleType

from roadwork_dist.common.errors import MissingDependencyError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional module, or say which extra of this package brings it.

    Args:
        module: name to import, for example ``"wandb"``.
        extra: extra of ``roadwork_dist`` that installs it.
        purpose: what needs it, for the message.

    Raises:
        MissingDependencyError: the module cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{purpose} needs the package {module!r}, which cannot be imported ({error}): "
            f"install it with `pip install 'roadwork-dist[{extra}]'`"
        ) from error
