"""Settings as YAML, whatever their schema."""

from dataclasses import asdict
from typing import Any, ClassVar, Protocol

import yaml


class Settings(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


def to_yaml(config: Settings) -> str:
    """All settings of a dataclass as YAML, with every group and every default written out."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
