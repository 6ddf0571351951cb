"""Loads settings of any schema from presets, YAML files and dotted overrides."""

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.registry import nearest
from roadwork_dist.config.experiment import ExperimentConfig
from roadwork_dist.trainer.config import TrainConfig

DEFAULT_PRESET = "demo"

C = TypeVar("C", bound=TrainConfig)


def presets() -> dict[str, Path]:
    """The presets included in the package, by name."""
    folder = Path(str(files("roadwork_dist.config").joinpath("presets")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def resolve_config(name: str) -> Path:
    """The file that ``--config`` refers to: an existing file, or that of a preset.

    Raises:
        ConfigError: it is neither.
    """
    known = presets()
    if name in known:
        return known[name]
    path = Path(name)
    if path.is_file():
        return path
    raise ConfigError(
        f"--config {name!r} is neither a file nor a preset: "
        f"did you mean {nearest(name, list(known), n=1)[0]!r}? presets are {', '.join(known)}"
    )


def build_parser(schema: type[TrainConfig], prog: str, default: str | None = None) -> ArgumentParser:
    """A parser with one option per setting (``--optim.lr``), ``--config`` and ``--print_config``.

    Args:
        schema: the dataclass whose fields are the settings.
        prog: the command, for the help text.
        default: preset to read if no ``--config`` is given; None = the defaults of the schema.
    """
    # The docstrings below the fields of the schema become the help of the options.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config NAME] [--print_config] [--SETTING VALUE ...]",
        exit_on_error=False,
        allow_abbrev=False,  # --epoch is a typo, not --epochs
        description="Settings are read from the preset or file given with --config "
        f"(without one: {default or 'the defaults'}), then overridden by the options, left to right, "
        "regardless of the position of --config.",
    )
    parser.add_argument("--config", action="config", help=f"YAML file or preset: {', '.join(presets())}")
    parser.add_class_arguments(schema, None, fail_untyped=True)
    return parser


def parse_settings(
    schema: type[C], arguments: Sequence[str], *, prog: str = "roadwork-dist", default: str | None = None
) -> C:
    """Settings of a schema from command-line arguments.

    Args:
        schema: the dataclass whose fields are the settings.
        arguments: words of the command line, without the command.
        prog: the command, for the help text.
        default: preset to read if no ``--config`` is given; None = the defaults of the schema.

    Raises:
        ConfigError: an unknown key (the message names the nearest), a wrong type or an invalid value.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    parser = build_parser(schema, prog, default)
    try:
        namespace = parser.parse_args(_with_config_files(schema, arguments, default))
        settings = parser.instantiate(namespace).as_dict()
    except (ArgumentError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(_explain(error, schema)) from error
    settings.pop("config", None)
    return schema(**settings)


def parse_experiment(arguments: Sequence[str], *, prog: str = "roadwork-dist pretrain") -> ExperimentConfig:
    """Settings of an experiment; without ``--config``, those of the demo. See :func:`parse_settings`."""
    return parse_settings(ExperimentConfig, arguments, prog=prog, default=DEFAULT_PRESET)


def load_experiment(path: Path) -> ExperimentConfig:
    """Settings from a YAML file alone, for example a run folder's ``config.yaml``.

    Raises:
        ConfigError: as for :func:`parse_settings`.
    """
    return parse_experiment(["--config", str(path)])


def _with_config_files(schema: type, arguments: Sequence[str], default: str | None) -> list[str]:
    """All config files in their order, or the default preset if there is none, then the other words.

    Configs come first because a config that follows an option must not override that option.
    """
    names: list[str] = []
    others: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--config":
            names.append(next(words, ""))
        elif word.startswith("--config="):
            names.append(word.removeprefix("--config="))
        else:
            others.append(word)
    if not names and default is not None:
        names = [default]
    chosen = [f"--config={_readable(schema, resolve_config(name))}" for name in names]
    return [*chosen, *others]


def _readable(schema: type, path: Path) -> str:
    """The path itself, after checking that it contains settings; the parser's own errors name no file."""
    try:
        settings = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} contains no settings: expected lines like `epochs: 3`, got {settings!r}")
    _check_groups(path, settings, schema)
    return str(path)


def _check_groups(path: Path, settings: dict[str, Any], schema: type, prefix: str = "") -> None:
    """Refuse a group of settings that is given as a single value; the parser reports unknown keys."""
    for name, group in _groups(schema).items():
        value = settings.get(name, {})
        if not isinstance(value, dict):
            example = fields(group)[0].name
            raise ConfigError(
                f"{path}: {prefix}{name} is {value!r}, expected settings below it, such as "
                f"`{name}: {{{example}: …}}`"
            )
        _check_groups(path, value, group, f"{prefix}{name}.")


def setting_names(schema: type, prefix: str = "") -> list[str]:
    """Dotted names of all settings of a schema."""
    names: list[str] = []
    groups = _groups(schema)
    for item in fields(schema):
        names.append(prefix + item.name)
        if item.name in groups:
            names += setting_names(groups[item.name], f"{prefix}{item.name}.")
    return names


def _groups(schema: type) -> dict[str, type]:
    """The groups of settings in a schema, with their schemas."""
    defaults = {
        item.name: item.default_factory() if callable(item.default_factory) else item.default
        for item in fields(schema)
    }
    return {name: type(default) for name, default in defaults.items() if is_dataclass(default)}


# jsonargparse's messages about a value of the wrong type and about an unknown key.
_WRONG_TYPE = (
    re.compile(r"Parser key \"(?P<name>[\w.]+)\": Expected an? (?P<expected>.*)\. Got value: (?P<got>.*)"),
    re.compile(
        r"Parser key \"(?P<name>[\w.]+)\": .*Union subtypes Subtypes: \[(?P<expected>.*)\] Errors: .*"
        r"Given value: (?P<got>.*)"
    ),
)
_UNKNOWN_KEY = (
    re.compile(r"unrecognized arguments: --(?P<name>[\w.]+)"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<name>[\w.]+)'"),
    re.compile(r"(?:No action for key|Option|Key) [\"'](?P<name>[\w.]+)[\"']"),
)


def _explain(error: Exception, schema: type) -> str:
    text = " ".join(str(error).split())
    for pattern in _WRONG_TYPE:
        if match := pattern.search(text):
            kinds = re.sub(r"<class '(\w+)'>|typing\.", r"\1", match["expected"]).replace("NoneType", "null")
            kinds = re.sub(r"Literal\[([^\]]*)\]", r"\1", kinds)
            return f"{match['name']} is {match['got']!r}, expected {kinds}; see --help for every setting"
    for pattern in _UNKNOWN_KEY:
        if match := pattern.search(text):
            name = ".".join(part for part in (match.groupdict().get("group"), match["name"]) if part)
            close = nearest(name, [*setting_names(schema), "config", "print_config"], n=1)[0]
            return f"unknown setting {name!r}: did you mean {close!r}? see --help for all"
    return f"{text}; see --help for every setting and its type"
