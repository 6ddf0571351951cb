"""The roadwork detector: the trainable head, and the whole model of backbone and head.

B batch · V views · V' views kept by pruning · D width of the backbone · H width of the head ·
K classes · M mask classes · N real views of a batch
"""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from roadwork_dist.common.errors import CheckpointError, DataError
from roadwork_dist.config.batch import Batch, ModelOutput
from roadwork_dist.config.experiment import ModelConfig
from roadwork_dist.detector.attention import GatedAttentionBlock
from roadwork_dist.detector.fusions import build_fusion
from roadwork_dist.detector.heads import Classifier, MaskHead, view_head, weather_head
from roadwork_dist.detector.joint_fusion import JointFusion
from roadwork_dist.detector.layers import NORM_EPS, hidden_width, init_linear, promote
from roadwork_dist.detector.metadata import METADATA_WIDTH, MetadataEncoder
from roadwork_dist.detector.pretrained import (
    PretrainedConfig,
    load_into,
    read_config,
    read_weights,
    write_pretrained,
)
from roadwork_dist.detector.pruning import ViewPruning, keep_all
from roadwork_dist.detector.pyramid import MultiScalePyramid


class RoadworkHead(nn.Module):
    """Everything that is trained: features of a photo's views and its metadata → predictions.

    Pruning → input projection → pyramid → gated attention blocks → norm → view fusion → joint
    fusion with the metadata → classifier. The per-view head reads the normalised views before
    fusion. The weather and mask heads read the fused views before the metadata is added: they
    supervise the visual path, and weather must not be copied from the metadata.

    If all outputs contribute to the loss, every parameter has a gradient after every backward pass,
    whatever the batch contains. Data parallel training therefore need not search for unused
    parameters.

    Args:
        d_backbone: D.
        config: settings of the head.
        mask_head: whether to build the mask head (``config.mask_head`` with ``auto`` resolved).
    """

    def __init__(self, d_backbone: int, config: ModelConfig, *, mask_head: bool) -> None:
        super().__init__()
        self.d_backbone, self.config = d_backbone, config
        width = config.width
        self.pruning = ViewPruning(d_backbone, config.prune_keep) if config.prune_keep < 1 else None
        self.input_proj = nn.Linear(d_backbone, width)
        self.pyramid = MultiScalePyramid(width) if config.pyramid else None
        self.blocks = nn.ModuleList(
            GatedAttentionBlock(
                width,
                config.heads,
                config.kv_heads or config.heads,
                gate=config.gate,
                hidden=hidden_width(width, config.ffn_ratio),
                experts=config.experts,
                layers=config.layers,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.view_head = view_head(width)
        self.view_fusion = build_fusion(config)
        self.weather_head = weather_head(width)
        self.mask_head = MaskHead(width) if mask_head else None
        self.metadata = MetadataEncoder(config.metadata_dropout) if config.metadata else None
        self.joint_fusion = JointFusion(width, METADATA_WIDTH if config.metadata else 0, config.dropout)
        self.classifier = Classifier(width, config.dropout)
        init_linear(self.input_proj)

    def reset_parameters(self) -> None:
        """Reinitialise the weights of every part."""
        init_linear(self.input_proj)
        for part in (*self.children(), *self.blocks):
            if not isinstance(part, nn.ModuleList | nn.Linear):
                part.reset_parameters()

    def forward(self, features: Tensor, view_mask: Tensor, batch: Batch) -> ModelOutput:
        """Predict.

        Args:
            features: of the views [B, V, D], V from 1 to 12.
            view_mask: [B, V] bool, False = padding; at least one view per row. Values at padding
                are ignored.
            batch: metadata, see :meth:`MetadataEncoder.forward`, and ``views_of_photo`` where view
                selection left views out; pruning takes its share of that number.

        Raises:
            DataError: the features are not [B, V, D] of this head's D, or the mask is not [B, V].
        """
        self._check_shapes(features, view_mask)
        features = features.to(self.input_proj.weight.dtype).masked_fill(~view_mask.unsqueeze(-1), 0.0)
        prune = keep_all if self.pruning is None else self.pruning
        features, mask, kept = prune(features, view_mask, batch.get("views_of_photo"))

        x, balance = self._views(features, mask)  # [B, V', H]
        pooled, gates = self.view_fusion(x, mask)
        metadata = None if self.metadata is None else self.metadata(batch)
        fused = self.joint_fusion(pooled, metadata)
        view_gates = torch.zeros_like(view_mask, dtype=torch.float32)
        # Add, do not assign: padding points at view 0 with a gate of 0.
        view_gates = view_gates.scatter_add(1, kept, gates.float())
        return ModelOutput(
            logits=self.classifier(fused).float(),
            view_logits=self.view_head(x).float(),
            view_mask=mask,
            weather_logits=self.weather_head(pooled).float(),
            mask_logits=None if self.mask_head is None else self.mask_head(pooled).float(),
            view_gates=view_gates,
            kept=kept,
            fused=fused.float(),
            balance=balance.float(),
        )

    def _views(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, V', D] → normalised views [B, V', H] and load-balancing loss [B], mean over blocks."""
        x = promote(self.input_proj(features))
        if self.pyramid is not None:
            x = self.pyramid(x)
        balance = x.new_zeros(x.shape[0])
        for block in self.blocks:
            x, block_balance = block(x, mask)
            balance = balance + block_balance / len(self.blocks)
        return self.norm(x), balance

    def _check_shapes(self, features: Tensor, view_mask: Tensor) -> None:
        if features.ndim != 3 or features.shape[-1] != self.d_backbone:
            raise DataError(
                f"features have shape {tuple(features.shape)}, expected [batch, views, {self.d_backbone}]: "
                "they are not from the backbone that the model was built for: compute them with that one"
            )
        if view_mask.shape != features.shape[:2]:
            raise DataError(
                f"view_mask has shape {tuple(view_mask.shape)}, expected {tuple(features.shape[:2])}, "
                "the rows and views of the features: give the mask of these features"
            )


class RoadworkModel(nn.Module):
    """The head, preceded by a backbone if batches contain views instead of features.

    A backbone without trainable parameters is frozen: it stays in eval mode whatever the mode of the
    model (dropout, batch statistics and DINOv3's random rescaling stay off), and is not saved.

    Args:
        head: the trained part.
        backbone: maps views [N, 3, S, S] uint8 to features [N, D]; None = batches contain features.

    Attributes:
        backbone_identity: which backbone the features come from (name, hash); saved with the model.
        extra: additional data to save with the model; JSON.
    """

    def __init__(self, head: RoadworkHead, backbone: nn.Module | None) -> None:
        super().__init__()
        self.head = head
        self.backbone = backbone
        self.backbone_identity: dict[str, Any] = {}
        self.extra: dict[str, Any] = {}
        self.train(self.training)

    @property
    def backbone_is_frozen(self) -> bool:
        """Whether no parameter of the backbone is trainable; also true without a backbone."""
        return self.backbone is None or not any(p.requires_grad for p in self.backbone.parameters())

    def train(self, mode: bool = True) -> Self:
        """Set training mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.backbone is not None and self.backbone_is_frozen:
            self.backbone.eval()
        return self

    def forward(self, batch: Batch) -> ModelOutput:
        """Predict from ``batch["features"]`` if present, else from ``batch["views"]``.

        Raises:
            DataError: the batch has neither, or it has views but the model has no backbone.
        """
        mask = batch["view_mask"]
        if "features" in batch:
            return self._head(batch["features"], mask, batch)
        if "views" not in batch:
            raise DataError(
                f"the batch has neither features nor views, only {', '.join(sorted(batch))}: "
                "give it features [batch, views, width] or views [batch, views, 3, side, side]"
            )
        return self._head(self.features(batch["views"], mask), mask, batch)

    def _head(self, features: Tensor, mask: Tensor, batch: Batch) -> ModelOutput:
        output: ModelOutput = self.head(features, mask, batch)
        return output

    def features(self, views: Tensor, view_mask: Tensor) -> Tensor:
        """Run the backbone on the real views only.

        Args:
            views: [B, V, 3, S, S] uint8.
            view_mask: [B, V] bool, False = padding.

        Returns:
            [B, V, D], zeros at padding.

        Raises:
            DataError: the model has no backbone.
        """
        if self.backbone is None:
            raise DataError(
                "the batch has views but the model has no backbone: give it features, or load the model "
                "with its backbone"
            )
        real: Tensor = self.backbone(views[view_mask])  # [N, D]
        features = real.new_zeros(*view_mask.shape, real.shape[-1])
        return features.index_put((view_mask,), real)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        backbone_identity: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        """Write the trained weights to a folder, see :mod:`roadwork_dist.detector.pretrained`.

        Args:
            folder: created if needed; an older model in it is replaced.
            backbone_identity: which backbone to load (name, hash), for ``config.json``; None = the
                attribute.
            extra: additional data for ``config.json`` (must be JSON); None = the attribute.
            state: whole tensors of :meth:`saved_names`, if the model holds shards; None = its own.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        names = self.saved_names()
        source = self.state_dict() if state is None else state
        weights = {name: tensor for name, tensor in source.items() if name in names}
        config = PretrainedConfig(
            d_backbone=self.head.d_backbone,
            mask_head=self.head.mask_head is not None,
            model=self.head.config,
            backbone=self.backbone_identity if backbone_identity is None else backbone_identity,
            extra=self.extra if extra is None else extra,
        )
        write_pretrained(Path(folder), config, weights)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, backbone: nn.Module | None = None) -> Self:
        """Rebuild a saved model, in eval mode.

        Args:
            folder: written by :meth:`save_pretrained`.
            backbone: the backbone that ``config.json`` names; None = batches contain features. Its
                trained weights, if any, are loaded into it.

        Raises:
            CheckpointError: the folder is incomplete or damaged, does not match, or holds trained
                weights of a backbone and none was given.
        """
        folder = Path(folder)
        config = read_config(folder)
        model = cls(RoadworkHead(config.d_backbone, config.model, mask_head=config.mask_head), backbone)
        model.backbone_identity, model.extra = config.backbone, config.extra
        model.restore(folder)
        return model.eval()

    def body(self) -> nn.Module | None:
        """The backbone, to whose layers layer-wise learning rate decay applies; the rest is the head."""
        return self.backbone

    def saved_names(self) -> set[str]:
        """State dict names of what is saved: the head, and what training changes in the backbone."""
        names = {f"head.{name}" for name in self.head.state_dict()}
        if self.backbone is not None and not self.backbone_is_frozen:
            names |= {f"backbone.{name}" for name in _learned(self.backbone)}
        return names

    def restore(self, folder: Path) -> None:
        """Load in place what :meth:`save_pretrained` wrote to a folder.

        Raises:
            CheckpointError: as :meth:`from_pretrained`.
        """
        weights = read_weights(folder)
        load_into(self.head, _below("head.", weights), folder, strict=True)
        learned = _below("backbone.", weights)
        if learned and self.backbone is None:
            raise CheckpointError(
                f"{folder} holds weights of a backbone that was trained too: give from_pretrained the "
                f"backbone {self.backbone_identity.get('name', 'named in config.json')!r}"
            )
        if learned and self.backbone is not None:
            load_into(self.backbone, learned, folder, strict=False)


def _learned(backbone: nn.Module) -> set[str]:
    """Names of what training changes in a backbone: trainable parameters, and buffers (batch statistics)."""
    learned = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    learned |= {name for name, _ in backbone.named_buffers()}
    return learned & backbone.state_dict().keys()


def _below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
