"""Import optional packages, or report how to install them."""

from importlib import import_module
from types import ModuleType

from roadwork_dist.common.errors import MissingDependencyError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional module, or report which extra of this package installs it.

    Args:
        module: name to import, for example ``"wandb"``.
        extra: extra of ``roadwork_dist`` that installs it.
        purpose: what needs it, for the error message.

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
