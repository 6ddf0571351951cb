"""Locating pre-trained weights: a local folder, the hub's local cache, or the hub.

Without network access, a missing model fails immediately and a cached one loads immediately.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from roadwork_dist.common.errors import BackboneError
from roadwork_dist.common.hub import hub_reachable


def is_local(name: str) -> bool:
    """True if ``name`` is written as a path or is an existing folder."""
    return name.startswith((".", "/", "~")) or Path(name).is_dir()


def local_folder(name: str) -> Path:
    """The existing folder that ``name`` points to.

    Raises:
        BackboneError: it does not exist or holds no ``config.json``.
    """
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        raise BackboneError(
            f"{name!r} is read as a local folder, but {folder} is not a folder: correct the path"
        )
    if not (folder / "config.json").is_file():
        raise BackboneError(
            f"{folder} holds no config.json: expected a folder written by save_pretrained (transformers), "
            "save_for_hf (timm), or downloaded from the hub"
        )
    return folder


def fetch_folder(repo: str, *, setting: str, gated: bool = False) -> Path:
    """Folder with the config and weights of a hub repository, downloaded if not cached.

    Args:
        repo: ``owner/name`` on the hub.
        setting: configuration key named in errors, for example ``"backbone.name"``.
        gated: whether the repository is known to require accepting a licence.

    Raises:
        BackboneError: it is not available; the message says why and what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    offline = not hub_reachable()

    def snapshot(patterns: Sequence[str]) -> Path:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), local_files_only=offline))

    try:
        folder = snapshot(["*.json", "*.safetensors", "*.txt"])
        if not any(folder.glob("*.safetensors")):
            folder = snapshot(["*.json", "*.txt", "pytorch_model*.bin"])
    except GatedRepoError as error:
        raise BackboneError(f"{repo} is gated: {_access(repo)}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BackboneError(
            f"{repo!r} is not a repository on the hub, or a private one: correct {setting}, "
            "or log in with `hf auth login` if you have access"
        ) from error
    except (OSError, HfHubHTTPError) as error:
        access = f"; it is gated: {_access(repo)}" if gated else ""
        reason = "the hub cannot be reached" if offline else _first_line(error)
        raise BackboneError(
            f"{repo} is not a local folder, not in the hub's local cache and not available now ({reason}): "
            f"on a machine with network access run `hf download {repo} --local-dir DIR`, copy DIR here "
            f"and set {setting} to it{access}"
        ) from error
    return folder


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Hide the progress bar that transformers draws while it loads weights from a local file."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _access(repo: str) -> str:
    return f"accept the licence at https://huggingface.co/{repo}, then log in with `hf auth login`"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
