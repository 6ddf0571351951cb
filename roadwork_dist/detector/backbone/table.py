"""Table of known backbones: source of the weights, and architecture.

The architectures of the DINO families are given here so that they can be built without the hub
(random weights, benchmarks, parameter counts); weights from the hub come with their own ``config.json``.
Sources: DINOv3, arXiv 2508.10104, table 1; DINOv2, arXiv 2304.07193, table 16; the hub's model cards.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from roadwork_dist.common.registry import Registry


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """One row of the table."""

    loader: Literal["transformers", "timm", "packaged"]
    """Library that builds the network; ``packaged`` = timm with weights from a Python package."""
    source: str
    """Repository on the hub (transformers) or name of the architecture (timm)."""
    width: int
    """D, width of a feature."""
    patch: int | None = None
    """Side of a patch in px."""
    gated: bool = False
    """Whether the hub requires accepting a licence first."""
    architecture: Mapping[str, object] = field(default_factory=dict)
    """Keyword arguments of the transformers config class, with its ``model_type``."""


BACKBONES: Registry[BackboneSpec] = Registry("backbone")


def _add_dinov3(name: str, *, width: int, layers: int, heads: int, gated_mlp: bool) -> None:
    architecture = {
        "model_type": "dinov3_vit",
        "patch_size": 16,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_register_tokens": 4,  # the config class defaults to 0
        "use_gated_mlp": gated_mlp,
        "hidden_act": "silu" if gated_mlp else "gelu",
    }
    source = f"facebook/dinov3-{name.removeprefix('dinov3_')}-pretrain-lvd1689m"
    BACKBONES.register(name)(
        BackboneSpec(
            loader="transformers", source=source, width=width, patch=16, gated=True, architecture=architecture
        )
    )


def _add_dinov2(name: str, *, width: int, layers: int, heads: int, swiglu: bool) -> None:
    architecture = {
        "model_type": "dinov2",
        "patch_size": 14,
        "image_size": 518,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "use_swiglu_ffn": swiglu,
    }
    source = f"facebook/{name.replace('_', '-')}"
    BACKBONES.register(name)(
        BackboneSpec(loader="transformers", source=source, width=width, patch=14, architecture=architecture)
    )


_add_dinov3("dinov3_vith16plus", width=1280, layers=32, heads=20, gated_mlp=True)
_add_dinov3("dinov3_vitl16", width=1024, layers=24, heads=16, gated_mlp=False)
_add_dinov3("dinov3_vitb16", width=768, layers=12, heads=12, gated_mlp=False)
_add_dinov3("dinov3_vits16plus", width=384, layers=12, heads=6, gated_mlp=True)
_add_dinov3("dinov3_vits16", width=384, layers=12, heads=6, gated_mlp=False)
_add_dinov2("dinov2_giant", width=1536, layers=40, heads=24, swiglu=True)
_add_dinov2("dinov2_large", width=1024, layers=24, heads=16, swiglu=False)
BACKBONES.register("convnextv2_base")(
    BackboneSpec(loader="timm", source="convnextv2_base.fcmae_ft_in22k_in1k", width=1024)
)
BACKBONES.register("efficientnet_lite0")(
    BackboneSpec(loader="packaged", source="tf_efficientnet_lite0", width=1280)
)
