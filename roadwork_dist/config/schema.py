"""Every setting of an experiment, typed, documented and checked before anything is allocated.

``TrainConfig`` is all that :class:`roadwork_dist.Trainer` needs, for any model.
``ExperimentConfig`` adds what the roadwork detector needs. Settings are frozen: what ran is what
the run folder's ``config.yaml`` says.
"""

from dataclasses import dataclass, field
from typing import Literal

from roadwork_dist.common.errors import ConfigError


def _check(condition: bool, name: str, got: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {got!r}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and gradient clipping."""

    name: str = "adamw"
    """Registered optimizer; see ``roadwork_dist.optim.optimizers``."""
    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay; none on biases, norms and embeddings."""
    clip: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""

    def __post_init__(self) -> None:
        _check(self.lr > 0, "optim.lr", self.lr, "a number > 0")
        _check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "a number >= 0")
        _check(self.clip >= 0, "optim.clip", self.clip, "a number >= 0 (0 = off)")
        _check(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        _check(self.eps > 0, "optim.eps", self.eps, "a number > 0")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate as a function of the optimizer step."""

    name: str = "cosine"
    """Registered schedule: cosine, wsd or constant."""
    warmup_steps: int = 500
    """Optimizer steps of linear warm-up; cut to a tenth of the run if the run is shorter."""
    final_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    decay_share: float = 0.2
    """WSD only: share of the run that decays."""

    def __post_init__(self) -> None:
        _check(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "an integer >= 0")
        _check(0 <= self.final_ratio <= 1, "schedule.final_ratio", self.final_ratio, "a share in [0, 1]")
        _check(0 < self.decay_share <= 1, "schedule.decay_share", self.decay_share, "a share in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Exponential moving average of the trained weights, kept in fp32, used for validation."""

    enabled: bool = True
    """Keep an average at all."""
    decay: float = 0.9999
    """Decay per optimizer step once warmed up."""
    warmup: bool = True
    """Use min(decay, (1 + step) / (10 + step))."""

    def __post_init__(self) -> None:
        _check(0 < self.decay < 1, "ema.decay", self.decay, "a number in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When training state is saved and how much of it is kept."""

    every_steps: int = 0
    """Save every so many optimizer steps; 0 = at the end of each epoch only."""
    keep: int = 2
    """Newest checkpoints kept; the best is kept besides."""

    def __post_init__(self) -> None:
        _check(self.every_steps >= 0, "checkpoint.every_steps", self.every_steps, "an integer >= 0")
        _check(self.keep >= 1, "checkpoint.keep", self.keep, "an integer >= 1")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases; one run for all ranks."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """``offline`` writes below the run folder, to be sent later with ``wandb sync``."""
    project: str = "roadwork_dist"
    """Project name."""
    entity: str | None = None
    """Team or user; null = the account's own."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where figures go besides ``metrics.jsonl``, which is always written."""

    tensorboard: bool = False
    """Write TensorBoard events below the run folder."""
    progress: bool = True
    """Show progress: a live bar on a terminal, plain lines elsewhere."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What the Trainer needs to train any ``nn.Module``."""

    output_dir: str = "runs/default"
    """Run folder: resolved config, metrics, checkpoints, best weights, report."""
    resume: Literal["auto", "never"] = "auto"
    """``auto`` goes on from the newest whole checkpoint; ``never`` refuses a folder with one."""
    seed: int = 42
    """Seeds every random draw."""
    epochs: int = 30
    """Passes over the training data."""
    batch_size: int = 32
    """Rows per process and micro-batch."""
    accumulation: int = 1
    """Micro-batches per optimizer step."""
    workers: int = 0
    """Loader processes per training process."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 = autocast of the forward pass; weights stay in fp32."""
    compile: Literal["off", "default", "max-autotune"] = "off"
    """torch.compile mode of the trained model."""
    monitor: str = "mcc"
    """Validation figure that chooses the best weights, higher is better; ``-loss`` for the loss."""
    patience: int = 5
    """Stop after so many validations without a better figure; 0 = never."""
    max_nonfinite_steps: int = 5
    """Stop after so many skipped (non-finite) steps in a row."""
    device: Literal["auto", "cpu"] = "auto"
    """``cpu`` ignores GPUs."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation", "max_nonfinite_steps"):
            value = getattr(self, name)
            _check(value >= 1, name, value, "an integer >= 1")
        for name in ("workers", "patience", "seed"):
            value = getattr(self, name)
            _check(value >= 0, name, value, "an integer >= 0")


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Column names of a table or a Hugging Face data set; null = the data has no such column."""

    id: str | None = "id"
    image: str = "image"
    label: str | None = "label"
    latitude: str | None = "latitude"
    longitude: str | None = "longitude"
    weather: str | None = "weather"
    daytime: str | None = "daytime"
    scene: str | None = "scene"
    description: str | None = "description"
    mask: str | None = "mask"
    group: str | None = "group"
    """Photos of one group (a drive, a thing) never stand on both sides of a split."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which photos to train, validate and aim at.

    A source is a path or a hub id: a CSV or Parquet table, a folder that holds
    ``metadata.csv`` or ``metadata.parquet``, a Hugging Face data set saved to disk, a hub id as
    ``hf:owner/name:split``, or CMU ROADWork's COCO JSON.
    """

    train: str = "demo-data/train.csv"
    """Source of the training photos."""
    val: str | None = "demo-data/val.csv"
    """Source of the validation photos; null = split off from ``train``."""
    target: str | None = "demo-data/target.csv"
    """Source whose coordinates GPS-weighted sampling aims at; its labels are not read for that."""
    val_share: float = 0.15
    """Share of ``train`` split off, stratified and grouped by place, where ``val`` is null."""
    folds: int = 5
    """Folds of a cross-validation over ``train``, stratified and grouped like that split."""
    image_root: str | None = None
    """Folder that relative image paths start from; null = the folder of the table."""
    max_unreadable_share: float = 0.01
    """Share of unreadable photos above which the run stops before training."""
    max_pixels: int = 200_000_000
    """Photos with more pixels are refused (decompression bombs)."""
    text_encoder: str = "all-minilm-l6-v2"
    """Frozen sentence encoder: the packaged MiniLM, a sentence-transformers id, or a folder."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)

    def __post_init__(self) -> None:
        _check(0 < self.val_share < 1, "data.val_share", self.val_share, "a share in (0, 1)")
        _check(self.folds >= 2, "data.folds", self.folds, "an integer >= 2")
        _check(
            0 <= self.max_unreadable_share <= 1,
            "data.max_unreadable_share",
            self.max_unreadable_share,
            "a share in [0, 1]",
        )
        _check(self.max_pixels > 0, "data.max_pixels", self.max_pixels, "an integer > 0")


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How one photo becomes up to 12 square views."""

    size: int | Literal["auto"] = "auto"
    """Side S of a view in px; auto = what the backbone takes (largest multiple of the patch <= 518)."""
    policy: Literal["auto", "all", "global"] = "auto"
    """``auto`` = all views, but the global view only for photos whose short side is < 1.5 S."""
    grid: int = 3
    """Tiles per axis."""
    scale: float = 2.5
    """Long side of the shared image in units of S."""

    def __post_init__(self) -> None:
        if self.size != "auto":
            _check(self.size >= 32, "views.size", self.size, "'auto' or an integer >= 32")
        _check(1 <= self.grid <= 8, "views.grid", self.grid, "an integer from 1 to 8")
        _check(1.0 <= self.scale <= 8.0, "views.scale", self.scale, "a number from 1 to 8")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of training views; every view draws its own."""

    enabled: bool = True
    """Augment at all."""
    strength: float = 1.0
    """Scales every probability (capped at 1)."""
    policy: Literal["roadwork", "trivial"] = "roadwork"
    """``roadwork`` = the fifteen operations of the recipe; ``trivial`` = TrivialAugment (wide)."""
    copies: int = 4
    """Augmented copies kept in the feature store; epoch e uses copy e mod copies, also online. 0 = \
fresh draws every epoch, which needs ``features.mode: online``."""

    def __post_init__(self) -> None:
        _check(self.strength >= 0, "augment.strength", self.strength, "a number >= 0")
        _check(self.copies >= 0, "augment.copies", self.copies, "an integer >= 0")


@dataclass(frozen=True, kw_only=True)
class GpsConfig:
    """Sampling that favours training photos near the target set."""

    enabled: bool = True
    """Weight samples by distance; without a target source or coordinates: uniform."""
    clusters: int = 5
    """K-means centres of the target coordinates."""
    near_weight: float = 5.0
    """Weight below 50 km; the others are 2.5, 1.0, 0.3 (200, 500 km, beyond) and 1.0 without GPS."""
    min_share_100km: float = 0.7
    """Least share of draws within 100 km of a centre."""
    on_shortfall: Literal["stop", "continue"] = "stop"
    """What to do when raised weights do not reach the share either."""

    def __post_init__(self) -> None:
        _check(self.clusters >= 1, "gps.clusters", self.clusters, "an integer >= 1")
        _check(self.near_weight > 0, "gps.near_weight", self.near_weight, "a number > 0")
        _check(0 <= self.min_share_100km <= 1, "gps.min_share_100km", self.min_share_100km, "a share")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The vision foundation model that turns a view into a vector."""

    name: str = "auto"
    """Name of the table, any timm or transformers id, or a local folder; auto = \
dinov3_vith16plus on a GPU, efficientnet_lite0 on a CPU."""
    trainable: Literal["none", "last_n", "all"] = "none"
    """Which part learns; anything but none needs ``features.mode: online``."""
    last_n: int = 2
    """Blocks that learn with ``last_n``."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of the frozen backbone; on a CPU without bf16 units fp32 is faster."""
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    """Attention of transformers backbones: flash where installed, else SDPA."""
    gradient_checkpointing: bool = False
    """Recompute activations of an unfrozen backbone in the backward pass."""

    def __post_init__(self) -> None:
        _check(self.last_n >= 1, "backbone.last_n", self.last_n, "an integer >= 1")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Keeping what the frozen backbone computes."""

    mode: Literal["cached", "online"] = "cached"
    """``cached`` computes each view once and keeps it on disk; ``online`` keeps nothing."""
    dir: str = "runs/features"
    """Folder of the feature store; shared by runs."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Stored dtype."""
    batch_views: int = 48
    """Views per forward pass of the backbone while features are computed."""

    def __post_init__(self) -> None:
        _check(self.batch_views >= 1, "features.batch_views", self.batch_views, "an integer >= 1")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The trainable head."""

    width: int = 512
    """Width H of the head."""
    prune_keep: float = 0.67
    """Share of views kept by pruning (rounded down, at least 1); 1.0 = off."""
    pyramid: bool = True
    """Multi-scale pyramid after the input projection."""
    layers: int = 4
    """Gated attention blocks."""
    heads: int = 8
    """Attention heads; head width = width / heads."""
    kv_heads: int | None = None
    """Grouped key/value heads; null = as many as ``heads``."""
    gate: bool = True
    """Sigmoid gate on the attention output."""
    experts: int = 0
    """Experts of the FFN (top 2); 0 = plain SwiGLU."""
    ffn_ratio: float = 8 / 3
    """Hidden width of the SwiGLU FFN as a multiple of ``width``, rounded up to a multiple of 64."""
    view_fusion: bool = True
    """Gated view fusion; false = masked mean over views."""
    metadata: bool = True
    """Use GPS, weather, daytime, scene and text."""
    metadata_dropout: float = 0.3
    """Chance in training that a present field is dropped to null."""
    dropout: float = 0.1
    """Dropout of fusion and classifier."""
    mask_head: Literal["auto", "on", "off"] = "auto"
    """``auto`` = on where the training data has masks."""

    def __post_init__(self) -> None:
        _check(self.width >= 64 and self.width % 64 == 0, "model.width", self.width, "a multiple of 64")
        divides_width = self.heads >= 1 and self.width % self.heads == 0
        _check(divides_width, "model.heads", self.heads, f"a divisor of width {self.width}")
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        divides_heads = kv_heads >= 1 and self.heads % kv_heads == 0
        _check(divides_heads, "model.kv_heads", kv_heads, f"a divisor of heads {self.heads}")
        _check(0 < self.prune_keep <= 1, "model.prune_keep", self.prune_keep, "a share in (0, 1]")
        _check(self.layers >= 0, "model.layers", self.layers, "an integer >= 0")
        _check(self.ffn_ratio > 0, "model.ffn_ratio", self.ffn_ratio, "a number > 0")
        _check(self.experts == 0 or self.experts >= 2, "model.experts", self.experts, "0 or >= 2")
        for name in ("metadata_dropout", "dropout"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"model.{name}", value, "a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Parts of the loss and their weights."""

    weights: dict[str, float] | Literal["auto"] = "auto"
    """Weight of focal, consistency, weather, dice; auto = 0.40/0.25/0.15/0.20 with masks, \
0.50/0.30/0.20 without."""
    gamma: float = 2.0
    """Focusing exponent of the focal loss."""
    alpha: float = 0.25
    """Weight of the positive class in the focal loss; the negative class has 1 - alpha."""
    label_smoothing: float = 0.1
    """Label smoothing of the focal loss."""
    balance: float = 0.01
    """Weight of the experts' load-balancing loss."""

    def __post_init__(self) -> None:
        _check(self.gamma >= 0, "loss.gamma", self.gamma, "a number >= 0")
        _check(0 < self.alpha < 1, "loss.alpha", self.alpha, "a number in (0, 1)")
        _check(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "in [0, 1)")
        if self.weights != "auto":
            known = {"focal", "consistency", "weather", "dice"}
            _check(set(self.weights) <= known, "loss.weights", self.weights, f"keys of {sorted(known)}")
            is_usable = all(weight >= 0 for weight in self.weights.values()) and any(self.weights.values())
            _check(is_usable, "loss.weights", self.weights, "numbers >= 0, one of them > 0")
        _check(self.balance >= 0, "loss.balance", self.balance, "a number >= 0")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation and the report."""

    bootstrap: int = 2000
    """Bootstrap resamples of every interval."""
    worst: int = 10
    """Worst errors shown with their views."""
    report: bool = True
    """Write ``report.html`` at the end of training."""

    def __post_init__(self) -> None:
        _check(self.bootstrap >= 100, "eval.bootstrap", self.bootstrap, "an integer >= 100")
        _check(self.worst >= 0, "eval.worst", self.worst, "an integer >= 0")


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(TrainConfig):
    """A whole experiment: photos on disk to a trained, evaluated, reported detector."""

    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    gps: GpsConfig = field(default_factory=GpsConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backbone.trainable != "none" and self.features.mode == "cached":
            raise ConfigError(
                f"features.mode is 'cached' but backbone.trainable is {self.backbone.trainable!r}: "
                "features of a backbone that learns go stale; set features.mode to online"
            )
        if self.augment.enabled and self.augment.copies == 0 and self.features.mode == "cached":
            raise ConfigError(
                "augment.copies is 0 (fresh draws every epoch) but features.mode is 'cached': "
                "set augment.copies to 1 or more, or features.mode to online"
            )
