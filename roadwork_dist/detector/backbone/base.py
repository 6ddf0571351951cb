"""Base class of backbones: uint8 views in, one feature vector per view out.

N views (B·V flattened) · S side of a view in px · D width of the backbone
"""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from roadwork_dist.common.errors import BackboneError, ConfigError
from roadwork_dist.config.experiment import BackboneConfig
from roadwork_dist.detector.backbone.flops import count_operations, training_operations

LARGEST_VIEW = 518
"""``auto`` is the largest multiple of the patch size up to this many px."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class BackboneInfo:
    """Properties of a backbone that the rest of the package needs."""

    name: str
    """Name it was requested by."""
    width: int
    """D, width of a feature."""
    patch: int | None
    """Side of a patch in px; None for networks without patches (any size is accepted)."""
    native_size: int
    """Side in px that the weights were trained at; the ``auto`` size of networks without patches."""
    mean: Triple
    """Mean per RGB channel, of values in [0, 1]."""
    std: Triple
    """Standard deviation per RGB channel."""
    identity: str
    """SHA-256 of architecture and weights, before any cast."""
    fixed_size: bool = False
    """True if the network accepts only views of ``native_size``."""


class Backbone(nn.Module, ABC):
    """A vision foundation model that turns a view into a vector.

    Frozen (``trainable: none``): always in eval mode, even after ``train()``; no gradient; weights in
    the configured dtype. Autocast is disabled inside, so features are the same wherever they are
    computed.

    Trainable (``last_n``, ``all``): master weights in float32 (the trainer applies autocast); frozen
    parts stay in eval mode. Two things stay in eval mode even inside trainable parts: batch
    normalisation (its statistics would depend on how a batch is split over processes) and rotary
    position embeddings (DINOv3 rescales them at random in train mode, with one draw per batch; scale
    is already augmented before the backbone, per view and reproducibly).
    """

    _mean: Tensor  # [1, 3, 1, 1]
    _std: Tensor  # [1, 3, 1, 1]

    def __init__(self, info: BackboneInfo, network: nn.Module) -> None:
        super().__init__()
        self.info = info
        self.network = network
        self.frozen = True
        self.dtype = torch.float32
        self.register_buffer("_mean", _channels(info.mean), persistent=False)
        self.register_buffer("_std", _channels(info.std), persistent=False)

    @property
    def name(self) -> str:
        """Name it was requested by."""
        return self.info.name

    @property
    def width(self) -> int:
        """D, width of a feature."""
        return self.info.width

    @property
    def patch(self) -> int | None:
        """Side of a patch in px, or None."""
        return self.info.patch

    @property
    def mean(self) -> Triple:
        """Mean per RGB channel, of values in [0, 1]."""
        return self.info.mean

    @property
    def std(self) -> Triple:
        """Standard deviation per RGB channel."""
        return self.info.std

    @property
    def identity(self) -> str:
        """SHA-256 of architecture and weights as loaded, in hex."""
        return self.info.identity

    def view_size(self, size: int | Literal["auto"] = "auto") -> int:
        """Side S of a view in px.

        ``auto`` is the largest multiple of the patch size <= 518, or the size that the weights were
        trained at for networks without patches.

        Raises:
            ConfigError: the network does not accept this size, or would lose pixels at it.
        """
        if size == "auto":
            return LARGEST_VIEW // self.patch * self.patch if self.patch else self.info.native_size
        if self.patch and size % self.patch:
            below = size // self.patch * self.patch
            raise ConfigError(
                f"views.size is {size}, expected a multiple of the patch of {self.name} ({self.patch} px): "
                f"set it to {below or self.patch}, {below + self.patch} or auto"
            )
        if self.info.fixed_size and size != self.info.native_size:
            raise ConfigError(
                f"views.size is {size}, but {self.name} takes {self.info.native_size} px only: set it to auto"
            )
        return size

    def forward(self, views: Tensor) -> Tensor:
        """Compute features of views.

        Args:
            views: [N, 3, S, S] uint8, RGB, on any device.

        Returns:
            [N, D] float32, also if the backbone computes in bf16.

        Raises:
            TypeError: ``views`` are not uint8 (probably already normalised).
        """
        if not self.frozen:
            return self._extract(self._images(views)).float()
        with torch.no_grad(), torch.autocast(self._mean.device.type, enabled=False):
            return self._extract(self._images(views)).float()

    @torch.no_grad()
    def forward_cells(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features of views and, in the same pass, the spatial feature map. No gradient.

        Args:
            views: as for :meth:`forward`.

        Returns:
            Features [N, D] float32, as from :meth:`forward`, and cells [N, G, G, C], rows from top to
            bottom: patch tokens, or the last map of a convolutional network.

        Raises:
            BackboneError: the network has no square map.
        """
        precision = (
            nullcontext() if not self.frozen else torch.autocast(self._mean.device.type, enabled=False)
        )
        with precision:
            features, cells = self._extract_cells(self._images(views))
        return features.float(), cells

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode of the trainable parts; everything else stays in eval mode."""
        super().train(False)
        self.training = mode
        if mode and not self.frozen:
            _train_trainable_parts(self.network)
        return self

    def forward_operations(self, size: int) -> int:
        """Floating-point operations of the forward pass of one view of ``size`` px.

        Counted on the meta device: see :func:`roadwork_dist.detector.backbone.flops.count_operations`.
        """
        weights = {
            name: tensor.to("meta") for name, tensor in (*self.named_parameters(), *self.named_buffers())
        }
        images = torch.empty(1, 3, size, size, dtype=self.dtype, device="meta")
        extract = _Extract(self)
        with torch.no_grad():
            return count_operations(
                lambda: functional_call(extract, {f"backbone.{n}": t for n, t in weights.items()}, (images,))
            )

    def training_operations(self, size: int) -> float:
        """Floating-point operations of the forward and backward pass of one training view.

        The backward pass counts from the first trainable block.
        """
        learning = {n for n, p in self.network.named_parameters() if p.requires_grad}
        blocks = self._blocks() if learning else []
        first = next((i for i, block in enumerate(blocks) if learning & set(block)), len(blocks))
        share = (len(blocks) - first) / len(blocks) if blocks else 0.0
        return training_operations(self.forward_operations(size), share)

    def apply_config(self, config: BackboneConfig, device: torch.device) -> "Backbone":
        """Freeze or unfreeze and cast as configured, and move to a device.

        Raises:
            ConfigError: ``backbone.last_n`` exceeds the number of blocks.
        """
        self.frozen = config.trainable == "none"
        names = self._trainable_names(config)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name in names)
        if self.frozen and config.dtype == "bf16":
            self._cast(torch.bfloat16)
        if not self.frozen and config.gradient_checkpointing:
            self._checkpoint_gradients()
        self.to(memory_format=torch.channels_last)
        return self.to(device).train(False)

    @abstractmethod
    def _extract(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, S, S] → [N, D]: normalised CLS token or pooled feature."""

    @abstractmethod
    def _extract_cells(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Like ``_extract``, plus cells [N, G, G, C]; see :meth:`forward_cells`."""

    @abstractmethod
    def _blocks(self) -> list[list[str]]:
        """Parameter names of each block, in order of depth; the last includes the layers after it."""

    @abstractmethod
    def _checkpoint_gradients(self) -> None:
        """Recompute activations of the blocks in the backward pass."""

    def _images(self, views: Tensor) -> Tensor:
        if views.dtype != torch.uint8:
            raise TypeError(f"views are {views.dtype}, expected uint8: the backbone normalises them itself")
        images = views.to(self._mean.device, non_blocking=True).to(torch.float32)
        images = (images / 255 - self._mean) / self._std
        return images.to(self.dtype)

    def _trainable_names(self, config: BackboneConfig) -> set[str]:
        if config.trainable == "none":
            return set()
        if config.trainable == "all":
            return {name for name, _ in self.network.named_parameters() if _is_used(name)}
        blocks = self._blocks()
        if config.last_n > len(blocks):
            raise ConfigError(
                f"backbone.last_n is {config.last_n}, but {self.name} has {len(blocks)} blocks: "
                "set it to at most that, or backbone.trainable to all"
            )
        return {name for block in blocks[-config.last_n :] for name in block if _is_used(name)}

    def _cast(self, dtype: torch.dtype) -> None:
        """Cast the weights, except batch statistics and rotary frequencies, which need more precision."""
        for module in self.network.modules():
            if isinstance(module, _BatchNorm) or _is_rotary(module):
                continue
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(module, name, buffer.to(dtype))
        self.dtype = dtype


class _Extract(nn.Module):
    """:meth:`Backbone._extract` as the forward pass of a module.

    It starts after the normalisation, because :meth:`Backbone.forward` uses autocast, which the meta
    device does not support.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone._extract(images)


def square_cells(tokens: Tensor, name: str) -> Tensor:
    """Patch tokens [N, P, C], row by row, as [N, G, G, C].

    Raises:
        BackboneError: P is not a square number.
    """
    side = round(tokens.shape[1] ** 0.5)
    if side * side != tokens.shape[1]:
        raise BackboneError(
            f"{name} has {tokens.shape[1]} patch tokens, expected a square grid, from which views.select "
            "scores crops: choose another backbone, or set views.select to null"
        )
    return tokens.unflatten(1, (side, side))  # type: ignore[no-any-return, no-untyped-call]


def _channels(values: Triple) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu").reshape(1, 3, 1, 1)


def _is_used(name: str) -> bool:
    # Mask tokens are for pre-training only. They get no gradient, which would fail data parallel training.
    return not name.endswith("mask_token")


def _is_rotary(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "rope" in name or "rotary" in name


def _train_trainable_parts(module: nn.Module) -> None:
    """Put modules with trainable weights, and the dropout next to them, into train mode."""
    module.training = True
    for child in module.children():
        if isinstance(child, _BatchNorm) or _is_rotary(child):
            continue
        weights = list(child.parameters())
        if not weights or any(weight.requires_grad for weight in weights):
            _train_trainable_parts(child)
