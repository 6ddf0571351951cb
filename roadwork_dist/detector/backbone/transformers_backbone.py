"""Backbones built by transformers."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from roadwork_dist.common.errors import BackboneError
from roadwork_dist.detector.backbone.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    BackboneInfo,
    Triple,
    square_cells,
)
from roadwork_dist.detector.backbone.token_merging import Merging, merge_tokens
from roadwork_dist.detector.hub import no_progress_bar
from roadwork_dist.detector.weights_identity import weights_identity

CLASS_TOKEN_TYPES = frozenset({"dinov3_vit", "dinov2", "dinov2_with_registers", "vit", "deit", "vit_msn"})
"""Model types whose ``last_hidden_state[:, 0]`` is the CLS token after the final norm, for any view
size. Their ``pooler_output`` may be the output of an additional dense layer with tanh, so it is not used."""

MEAN_TYPES = frozenset({"ijepa"})
"""Model types without CLS token and pooled output: all tokens are patches. Transformers' own classifier uses
their mean after the final norm (``IJepaForImageClassification``)."""

VOLATILE = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id"}
)
"""Config keys that do not change what the network computes."""


class TransformersBackbone(Backbone):
    """A transformers vision network.

    Its feature is the normalised CLS token if it has one, else the pooled output or the mean of its tokens.
    """

    def __init__(self, info: BackboneInfo, network: nn.Module) -> None:
        super().__init__(info, network)
        config: Any = network.config
        self._class_token = config.model_type in CLASS_TOKEN_TYPES
        self._averages = config.model_type in MEAN_TYPES
        accepts = inspect.signature(network.forward).parameters
        # Learned position embeddings are interpolated only on request.
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepts else {}
        self._merges_tokens = False

    def merge_tokens(self, share: float) -> None:
        """Enable token merging (:mod:`~roadwork_dist.detector.backbone.token_merging`).

        The identity changes because the features do, so stored features never mix.

        Raises:
            ConfigError: this network's tokens cannot be merged.
        """
        merge_tokens(self.network, share, self.name)
        self._merges_tokens = True
        merged = weights_identity({"network": self.identity, "token_merging": share, "version": 1}, {})
        self.info = replace(self.info, identity=merged)

    def forward_operations(self, size: int) -> int:
        """As for any backbone, but with torch's own attention: the counter supports no other kernel."""
        config: Any = self.network.config
        chosen, config._attn_implementation = config._attn_implementation, "sdpa"
        try:
            return super().forward_operations(size)
        finally:
            config._attn_implementation = chosen

    def _extract(self, images: Tensor) -> Tensor:
        return self._feature(self._run(images, Merging()))

    def _extract_cells(self, images: Tensor) -> tuple[Tensor, Tensor]:
        merging = Merging()
        output = self._run(images, merging)
        tokens: Tensor = output.last_hidden_state
        if tokens.ndim == 4:  # the last map of a convolutional network
            return self._feature(output), tokens.permute(0, 2, 3, 1)
        config: Any = self.network.config
        prefix = 1 + getattr(config, "num_register_tokens", 0)
        if config.model_type == "deit":  # CLS and distillation token
            prefix = 2
        if self._averages:
            prefix = 0
        elif not self._class_token:  # CLIP has a CLS token, SigLIP has none
            prefix = 0 if round(tokens.shape[1] ** 0.5) ** 2 == tokens.shape[1] else 1
        patches = tokens[:, prefix:]
        return self._feature(output), square_cells(
            merging.spread(patches) if self._merges_tokens else patches, self.name
        )

    def _run(self, images: Tensor, merging: Merging) -> Any:
        """The network's output; ``merging`` holds the state of this pass if tokens are merged."""
        options = {"merging": merging} if self._merges_tokens else {}
        return self.network(pixel_values=images, **self._options, **options)

    def _feature(self, output: Any) -> Tensor:
        if self._class_token:
            tokens: Tensor = output.last_hidden_state  # [N, 1 + registers + P, D]
            return tokens[:, 0]
        if self._averages:
            patches: Tensor = output.last_hidden_state  # [N, P, D]
            return patches.mean(dim=1)
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        if pooled is None:
            raise BackboneError(
                f"{self.name} ({type(self.network).__name__}) returns no pooled feature: choose another model"
            )
        return pooled.flatten(1)

    def _blocks(self) -> list[list[str]]:
        prefix, count = _layer_list(self.network)
        blocks: list[list[str]] = [[] for _ in range(count)]
        for name, _ in self.network.named_parameters():
            if name.startswith(prefix):
                blocks[int(name.removeprefix(prefix).split(".")[0])].append(name)
            elif blocks[-1]:
                blocks[-1].append(name)  # the norm after the last block
        return blocks

    def _checkpoint_gradients(self) -> None:
        network: Any = self.network
        arguments = {"use_reentrant": False}
        if hasattr(network, "activation_checkpointing_enable"):  # its name in newer versions
            network.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
        else:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


def _layer_list(network: nn.Module) -> tuple[str, int]:
    """Prefix and length of the outermost list of blocks."""
    lists = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.ModuleList)]
    name, blocks = min(lists, key=lambda item: item[0].count("."))
    return f"{name}.", len(blocks)


def build_transformers(architecture: dict[str, Any]) -> nn.Module:
    """Build a network with random weights on torch's current default device.

    Args:
        architecture: arguments of the config class, with its ``model_type``.
    """
    from transformers import AutoConfig, AutoModel

    arguments = dict(architecture)
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    network: nn.Module = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    return network


def load_transformers_folder(name: str, folder: Path) -> TransformersBackbone:
    """Load a network in float32 from a folder written by ``save_pretrained``.

    Raises:
        BackboneError: the folder's config and weights do not match each other or this transformers version.
    """
    import transformers

    try:
        with no_progress_bar():
            network, loading = transformers.AutoModel.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(
            f"{folder} cannot be loaded by transformers {transformers.__version__}: {reason}"
        ) from error
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise BackboneError(
            f"{folder} lacks {len(missing)} weights of its own config ({missing[0]}, ...): download it again"
        )
    return wrap_transformers(name, network, *_normalisation(folder))


def wrap_transformers(
    name: str, network: nn.Module, mean: Triple = IMAGENET_MEAN, std: Triple = IMAGENET_STD
) -> TransformersBackbone:
    """Wrap a transformers network; its properties come from its config.

    Raises:
        BackboneError: it is not a vision network, or it masks its input at random.
    """
    network = getattr(network, "vision_model", network)  # the image tower of CLIP-like models
    config: Any = network.config
    if "pixel_values" not in inspect.signature(network.forward).parameters:
        raise BackboneError(f"{name} ({type(network).__name__}) takes no images: choose a vision model")
    if config.model_type == "vit_mae":
        raise BackboneError(
            f"{name} ({type(network).__name__}) masks patches at random in every pass, even in evaluation, "
            "so its features are not reproducible: choose another, such as dinov2_large"
        )
    if config.model_type in CLASS_TOKEN_TYPES | MEAN_TYPES and hasattr(network, "pooler"):
        network.pooler = None  # unused, and random where the weights lack it
    patch = _side(config.patch_size) if config.model_type in CLASS_TOKEN_TYPES | MEAN_TYPES else None
    architecture = {"library": "transformers", "class": type(network).__name__, "mean": mean, "std": std}
    # Only what differs from the defaults, so that fields added by later versions change nothing.
    architecture |= {key: value for key, value in config.to_diff_dict().items() if key not in VOLATILE}
    if config.model_type in MEAN_TYPES:
        architecture["feature"] = "mean"  # not to be mixed with stored features of the first token
    info = BackboneInfo(
        name=name,
        width=int(getattr(config, "hidden_size", None) or config.hidden_sizes[-1]),
        patch=patch,
        native_size=_side(getattr(config, "image_size", 224)),
        mean=mean,
        std=std,
        identity=weights_identity(architecture, network.state_dict()),
    )
    return TransformersBackbone(info, network)


def _side(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def _normalisation(folder: Path) -> tuple[Triple, Triple]:
    """Mean and standard deviation from the folder's image processor; ImageNet's if it has none."""
    path = folder / "preprocessor_config.json"
    settings: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    mean, std = settings.get("image_mean") or IMAGENET_MEAN, settings.get("image_std") or IMAGENET_STD
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
