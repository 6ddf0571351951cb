"""Loading a backbone by name: from the table, timm, transformers, or a local folder."""

import json
from pathlib import Path

import torch

from roadwork_dist.common.errors import BackboneError, ConfigError
from roadwork_dist.config.experiment import BackboneConfig
from roadwork_dist.detector.backbone.attention import Attention, choose_attention
from roadwork_dist.detector.backbone.base import Backbone
from roadwork_dist.detector.backbone.table import BACKBONES, BackboneSpec
from roadwork_dist.detector.backbone.timm_backbone import (
    build_timm,
    load_timm,
    load_timm_folder,
    packaged_efficientnet_lite0,
    wrap_timm,
)
from roadwork_dist.detector.backbone.transformers_backbone import (
    TransformersBackbone,
    build_transformers,
    load_transformers_folder,
    wrap_transformers,
)
from roadwork_dist.detector.hub import fetch_folder, is_local, local_folder


def load_backbone(config: BackboneConfig, *, device: torch.device | None = None) -> Backbone:
    """Load a backbone with its pre-trained weights, frozen or not as configured, onto a device.

    ``config.name`` is resolved in this order: ``auto`` (dinov3_vith16plus on a GPU, efficientnet_lite0
    elsewhere); a name in the table; a local folder (starts with ``.``, ``/`` or ``~``, or exists);
    ``timm:`` and timm's name; ``owner/name`` on the hub; timm's bare name.

    Args:
        config: name, trainable part, dtype and attention.
        device: target device; None = the first GPU, or the CPU.

    Raises:
        BackboneError: it cannot be loaded; the message says how to get it or which path was tried.
        ConfigError: the name is unknown, or the backbone does not support the settings.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = _load(resolve_name(config.name, device))
    dtype = config.dtype if config.trainable == "none" else "fp32"
    _set_up(backbone, config.attention, config.token_merging, device, dtype)
    return backbone.apply_config(config, device)


def _set_up(
    backbone: Backbone, attention: Attention, merging: float, device: torch.device, dtype: str
) -> None:
    """Choose the attention and merge tokens, as configured."""
    if isinstance(backbone, TransformersBackbone):
        # Merged tokens need a bias on their scores, which FlashAttention does not take.
        choose_attention(backbone.network, "sdpa" if merging else attention, device, dtype)
        if merging:
            backbone.merge_tokens(merging)
    elif merging:
        raise ConfigError(
            f"backbone.token_merging is {merging}, but {backbone.name} is not a vision transformer of "
            "transformers (DINOv2, DINOv3): set it to 0"
        )
    elif attention == "flash":
        raise ConfigError(
            f"backbone.attention is 'flash', but {backbone.name} is not a transformers network, and only "
            "those support it: set it to auto"
        )


def resolve_name(name: str, device: torch.device) -> str:
    """Resolve ``auto`` for a device; any other name is returned unchanged."""
    if name != "auto":
        return name
    return "dinov3_vith16plus" if device.type == "cuda" else "efficientnet_lite0"


def build_random(
    name: str,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    attention: Attention = "auto",
    token_merging: float = 0.0,
) -> Backbone:
    """A frozen backbone from the table with RANDOM weights: for benchmarks and tests, never for results.

    Needs neither network access nor weights. On ``torch.device("meta")`` nothing is allocated, which
    is how parameters are counted.

    Raises:
        ConfigError: the name is not in the table, or its tokens cannot be merged.
    """
    device = device or torch.device("cpu")
    spec = BACKBONES[name]
    with device:
        if spec.loader == "transformers":
            backbone: Backbone = wrap_transformers(name, build_transformers(dict(spec.architecture)))
        else:
            backbone = wrap_timm(name, build_timm(spec.source))
    dtype_name: str = "bf16" if dtype == torch.bfloat16 else "fp32"
    _set_up(backbone, attention, token_merging, device, dtype_name)
    config = BackboneConfig(name=name, dtype="bf16" if dtype_name == "bf16" else "fp32")
    return backbone.apply_config(config, device)


def _load(name: str) -> Backbone:
    if name in BACKBONES:
        return _load_spec(name, BACKBONES[name])
    if is_local(name):
        return _load_folder(name, local_folder(name))
    if name.startswith("timm:"):
        return load_timm(name, name.removeprefix("timm:"))
    if "/" in name:
        return _load_folder(name, fetch_folder(name, setting="backbone.name"))
    import timm

    if timm.is_model(name):
        return load_timm(name, name)
    return _load_spec(name, BACKBONES[name])  # raises, and lists the choices


def _load_spec(name: str, spec: BackboneSpec) -> Backbone:
    if spec.loader == "packaged":
        return packaged_efficientnet_lite0(name)
    if spec.loader == "timm":
        return load_timm(name, spec.source)
    folder = fetch_folder(spec.source, setting="backbone.name", gated=spec.gated)
    return load_transformers_folder(name, folder)


def _load_folder(name: str, folder: Path) -> Backbone:
    """Load a folder with the library that wrote it, according to its ``config.json``."""
    try:
        settings = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise BackboneError(f"{folder / 'config.json'} is not JSON ({error}): download it again") from error
    if "model_type" in settings:
        return load_transformers_folder(name, folder)
    if "architecture" in settings:
        return load_timm_folder(name, folder)
    raise BackboneError(
        f"{folder / 'config.json'} has neither model_type (transformers) nor architecture (timm): "
        "expected a folder written by save_pretrained or save_for_hf"
    )
