"""Identity of a feature space: everything that determines a stored feature, except the photo."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from roadwork_dist.common.errors import ConfigError

logger = logging.getLogger(__name__)

STORED_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MANIFEST = "manifest.json"
NOTES = "notes.json"
"""Information for people: names of the backbone and of the data sets. Nothing depends on it."""


@dataclass(frozen=True)
class FeatureSpace:
    """Everything that determines the value of a stored feature, except the photo.

    Each entry is found by the hash of its photo's bytes, so no field here depends on the data set:
    photos may be added, moved and renamed.

    Args:
        views: :meth:`ViewGeometry.identity`.
        augment: :meth:`Augmenter.identity`, or ``None`` for views without augmentation.
        backbone: identity of the backbone: architecture, hash of its weights, precision.
        dtype: stored dtype.
    """

    views: dict[str, object]
    augment: dict[str, object] | None
    backbone: str
    dtype: Literal["bf16", "fp32"]

    def describe(self) -> str:
        """The fields as JSON with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    @property
    def key(self) -> str:
        """Name of the space's folder: 20 hex digits of the SHA-256 of :meth:`describe`."""
        return hashlib.sha256(self.describe().encode()).hexdigest()[:20]

    @property
    def torch_dtype(self) -> torch.dtype:
        """Stored dtype as a torch dtype."""
        return STORED_DTYPES[self.dtype]

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Where the fields of a manifest differ: ``name is <theirs>, expected <own>`` for each."""
        own = json.loads(self.describe())
        return list(_differences("", own, dict(other)))


def _differences(prefix: str, own: Any, other: Any) -> Iterator[str]:
    if isinstance(own, dict) and isinstance(other, dict):
        for name in sorted(own.keys() | other.keys()):
            yield from _differences(f"{prefix}.{name}".lstrip("."), own.get(name), other.get(name))
    elif own != other:
        yield f"{prefix} is {_short(other)}, expected {_short(own)}"


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 120 else f"{text[:100]}…"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Fields of the space in a folder.

    Raises:
        FileNotFoundError: there is no manifest.
        ConfigError: the manifest is damaged.
    """
    path = folder / MANIFEST
    content = path.read_bytes()
    try:
        fields = json.loads(content)
    except ValueError as error:
        raise ConfigError(
            f"{path} cannot be read ({error}), expected the identity of the features in its folder: "
            "restore it, or delete the folder to have its features computed again"
        ) from error
    if not isinstance(fields, dict):
        raise ConfigError(
            f"{path} holds {_short(fields)}, expected the identity of the features in its folder: "
            "restore it, or delete the folder to have its features computed again"
        )
    return fields


def check_manifest(folder: Path, space: FeatureSpace) -> None:
    """Compare a folder's manifest with the expected space.

    Raises:
        FileNotFoundError: there is no manifest.
        ConfigError: a field differs; the message names it, what was got and what was expected.
    """
    differing = space.differences(read_manifest(folder))
    if differing:
        raise ConfigError(
            f"the features in {folder} are of another kind: {'; '.join(differing)}: use the settings they "
            "were computed with, or another features.dir"
        )


def read_notes(folder: Path) -> dict[str, Any]:
    """The notes of a space; empty if they are missing or unreadable."""
    try:
        notes = json.loads((folder / NOTES).read_bytes())
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def in_words(fields: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    """A manifest's fields as one readable line."""
    identity, _, arithmetic = str(fields.get("backbone")).partition(" ")
    name = f"{notes['backbone']} ({identity[:8]})" if "backbone" in notes else identity[:16]
    views, augment = fields.get("views") or {}, fields.get("augment")
    shown = _listed(views)
    drawn = "not augmented"
    if isinstance(augment, dict):
        drawn = f"augmented ({_listed(augment)})"
    return f"{name} in {arithmetic or '?'}, stored as {fields.get('dtype')} · views ({shown}) {drawn}"


def _listed(fields: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in fields.items() if isinstance(value, int | float | str)}
    return ", ".join(f"{name} {value}" for name, value in plain.items())


def tell_nearest(root: Path, folder: Path, space: FeatureSpace) -> None:
    """Log which fields differ in the most similar existing space, and so prevent its reuse."""
    nearest: tuple[int, Path, list[str]] | None = None
    for manifest in sorted(root.glob(f"*/{MANIFEST}")):
        if manifest.parent == folder:
            continue
        with suppress(ConfigError, OSError):
            fields = read_manifest(manifest.parent)
            # Spaces with and without augmentation are not alternatives to each other.
            if (fields.get("augment") is None) == (space.augment is None):
                differing = space.differences(fields)
                nearest = min(nearest or (99, folder, []), (len(differing), manifest.parent, differing))
    if nearest is not None:
        logger.info(
            "no stored features fit these settings; in the most similar folder, %s, %s",
            nearest[1],
            nearest[2],
        )
