"""Settings of the roadwork detector: photos, views, backbone, head, loss, evaluation."""

from dataclasses import field
from typing import ClassVar, Literal

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.settings import settings
from roadwork_dist.trainer.config import TrainConfig, check


@settings("data.columns")
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
    """Photos of one group (such as a drive or an object) are never on both sides of a split."""


@settings("data.remote")
class RemoteConfig:
    """How photos on a server (``https://``, ``s3://``, ``gs://``, …) are downloaded."""

    cache_dir: str = "~/.cache/roadwork_dist/shards"
    """Local folder that caches shards; shared by runs and processes."""
    cache_gb: float = 50.0
    """Maximum GiB of cached shards; the least recently read are deleted first."""
    read_ahead: int = 2
    """Shards prefetched per process; 0 = none."""
    attempts: int = 8
    """Consecutive attempts without progress before a download fails."""
    timeout: float = 30.0
    """Timeout in seconds for connecting and for receiving the next bytes."""

    def __post_init__(self) -> None:
        check(self.cache_gb > 0, "data.remote.cache_gb", self.cache_gb, "a number > 0")
        check(self.read_ahead >= 0, "data.remote.read_ahead", self.read_ahead, "an integer >= 0")
        check(self.attempts >= 1, "data.remote.attempts", self.attempts, "an integer >= 1")
        check(self.timeout > 0, "data.remote.timeout", self.timeout, "seconds > 0")


@settings("data")
class DataConfig:
    """Photos for training, validation and the target.

    A source is a path or a hub id: a CSV or Parquet table, a folder that holds
    ``metadata.csv`` or ``metadata.parquet``, a folder of shards or its URL, a Hugging Face data set
    saved to disk, a hub id as ``hf:owner/name:split`` (``hf:owner/name:split?streaming`` streams its photos
    from the hub), or CMU ROADWork's COCO JSON.
    """

    train: str = "demo-data/train.csv"
    """Source of the training photos."""
    val: str | None = "demo-data/val.csv"
    """Source of the validation photos; null = split off from ``train``."""
    target: str | None = "demo-data/target.csv"
    """Source whose coordinates GPS-weighted sampling uses; its labels are not used for that."""
    val_share: float = 0.15
    """Share of ``train`` split off, stratified and grouped by place, if ``val`` is null."""
    folds: int = 5
    """Folds of a cross-validation over ``train``, stratified and grouped as for ``val_share``."""
    image_root: str | None = None
    """Folder that relative image paths start from; null = the folder of the table."""
    max_unreadable_share: float = 0.01
    """Share of unreadable photos above which the run stops before training."""
    max_pixels: int = 200_000_000
    """Photos with more pixels are rejected (decompression bombs)."""
    order: Literal["auto", "shuffled", "shards"] = "auto"
    """``shuffled`` draws every photo from the whole set; ``shards`` reads few shards per process at a time; \
auto = shards if the training photos are on a server."""
    shuffle_shards: int = 4
    """Shards whose photos a process shuffles together, with order ``shards``."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    """Download of photos from a server."""
    text_encoder: str = "all-minilm-l6-v2"
    """Frozen sentence encoder: the packaged MiniLM, a sentence-transformers id, or a folder."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)

    def __post_init__(self) -> None:
        check(0 < self.val_share < 1, "data.val_share", self.val_share, "a share in (0, 1)")
        check(self.folds >= 2, "data.folds", self.folds, "an integer >= 2")
        check(
            0 <= self.max_unreadable_share <= 1,
            "data.max_unreadable_share",
            self.max_unreadable_share,
            "a share in [0, 1]",
        )
        check(self.max_pixels > 0, "data.max_pixels", self.max_pixels, "an integer > 0")
        check(self.shuffle_shards >= 1, "data.shuffle_shards", self.shuffle_shards, "an integer >= 1")


@settings("views")
class ViewsConfig:
    """How one photo becomes up to 12 square views."""

    size: int | Literal["auto"] = "auto"
    """Side S of a view in px; auto = the backbone's size (largest multiple of the patch <= 518)."""
    policy: Literal["auto", "all", "global"] = "auto"
    """``auto`` = all views, but only the global view for photos whose short side is < 1.5 S."""
    grid: int = 3
    """Tiles per axis."""
    scale: float = 2.5
    """Long side of the shared image in units of S."""
    quality: Literal["fast", "exact"] = "fast"
    """``fast`` = large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size; ``exact`` = at full size, which \
takes half as much time again. Their features are stored separately."""
    decoder: Literal["cpu", "nvjpeg"] = "cpu"
    """``nvjpeg`` = an NVIDIA GPU decodes JPEGs at full size; needs ``workers: 0``. Their features are \
stored separately."""
    select: int | None = None
    """Crops that go through the backbone in addition to the global view at prediction, chosen by the \
selector from `roadwork-dist select-views`. null = all. Training always uses all views."""

    def __post_init__(self) -> None:
        if self.size != "auto":
            check(self.size >= 32, "views.size", self.size, "'auto' or an integer >= 32")
        check(1 <= self.grid <= 8, "views.grid", self.grid, "an integer from 1 to 8")
        check(1.0 <= self.scale <= 8.0, "views.scale", self.scale, "a number from 1 to 8")
        if self.select is not None:
            check(self.select >= 1, "views.select", self.select, "null or an integer >= 1")


@settings("augment")
class AugmentConfig:
    """Augmentation of training views, drawn independently for each view."""

    enabled: bool = True
    """Augment training views."""
    strength: float = 1.0
    """Factor on every probability (capped at 1)."""
    policy: Literal["roadwork", "trivial"] = "roadwork"
    """``roadwork`` = the fifteen operations of the recipe; ``trivial`` = TrivialAugment (wide)."""
    copies: int = 4
    """Augmented copies in the feature store; epoch e uses copy e mod copies, also online. 0 = new draws \
every epoch, which excludes stored features."""
    mix: Literal["off", "mixup", "cutmix"] = "off"
    """Mix training photos and their labels in pairs; new draws every epoch. ``online`` features mix pixels; \
``cached`` ones blend features (``mixup``) or exchange views (``cutmix``), so losses differ."""
    mix_alpha: float | Literal["auto"] = "auto"
    """Parameter of the Beta distribution of mixing shares; auto = 0.2 for MixUp, 1.0 for CutMix."""
    mix_share: float = 1.0
    """Probability that a photo is mixed."""

    def __post_init__(self) -> None:
        check(self.strength >= 0, "augment.strength", self.strength, "a number >= 0")
        check(self.copies >= 0, "augment.copies", self.copies, "an integer >= 0")
        if self.mix_alpha != "auto":
            check(self.mix_alpha > 0, "augment.mix_alpha", self.mix_alpha, "'auto' or a number > 0")
        check(0 <= self.mix_share <= 1, "augment.mix_share", self.mix_share, "a share")


@settings("gps")
class GpsConfig:
    """Sampling that favours training photos near the target set."""

    enabled: bool = True
    """Weight samples by distance; uniform without a target source or coordinates."""
    clusters: int = 5
    """K-means centres of the target coordinates."""
    near_weight: float = 5.0
    """Weight below 50 km; the others are 2.5 (< 200 km), 1.0 (< 500 km), 0.3 (beyond), 1.0 (no GPS)."""
    min_share_100km: float = 0.7
    """Minimum share of draws within 100 km of a centre."""
    on_shortfall: Literal["stop", "continue"] = "stop"
    """What to do if even raised weights do not reach the minimum share."""

    def __post_init__(self) -> None:
        check(self.clusters >= 1, "gps.clusters", self.clusters, "an integer >= 1")
        check(self.near_weight > 0, "gps.near_weight", self.near_weight, "a number > 0")
        check(0 <= self.min_share_100km <= 1, "gps.min_share_100km", self.min_share_100km, "a share")


@settings("backbone")
class BackboneConfig:
    """The vision foundation model that turns a view into a vector."""

    name: str = "auto"
    """Name in the backbone table, a timm or transformers id, or a local folder; auto = \
dinov3_vith16plus on a GPU, efficientnet_lite0 on a CPU."""
    trainable: Literal["none", "last_n", "all"] = "none"
    """Which part is trained; features are stored only with none."""
    last_n: int = 2
    """Number of last blocks trained with ``trainable: last_n``."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Dtype of the frozen backbone; fp32 is faster on a CPU without bf16 units."""
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    """Attention kernel of transformers backbones; auto = flash if installed, else SDPA."""
    gradient_checkpointing: bool = False
    """Recompute activations of a trainable backbone in the backward pass."""
    token_merging: float = 0.0
    """Share of patch tokens merged into similar ones up to the last block (DINOv2 and DINOv3 of \
transformers); faster, but changes the features. 0 = off."""

    def __post_init__(self) -> None:
        check(self.last_n >= 1, "backbone.last_n", self.last_n, "an integer >= 1")
        merging = self.token_merging
        check(0 <= merging <= 0.9, "backbone.token_merging", merging, "a share from 0 to 0.9")
        if merging and self.attention == "flash":
            raise ConfigError(
                "backbone.attention is 'flash' with backbone.token_merging on, which needs an attention bias "
                "that FlashAttention does not support: set backbone.attention to auto or sdpa"
            )


@settings("features")
class FeaturesConfig:
    """Storage of the frozen backbone's features."""

    mode: Literal["auto", "cached", "online"] = "auto"
    """``cached`` computes the features of each view once and stores them; ``online`` stores nothing; auto = \
cached if the backbone is frozen and epochs repeat their views (``augment.copies`` above 0), else online."""
    dir: str = "runs/features"
    """Folder of the feature store; shared by runs."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of stored features."""
    batch_views: int = 48
    """Views per forward pass of the backbone while features are computed."""
    on_device: Literal["auto", "never"] = "auto"
    """``auto`` = copy all stored features to the device if they fit into a quarter of its free memory."""

    def __post_init__(self) -> None:
        check(self.batch_views >= 1, "features.batch_views", self.batch_views, "an integer >= 1")


@settings("model")
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
    """Key/value heads (grouped-query attention); null = as many as ``heads``."""
    gate: bool = True
    """Sigmoid gate on the attention output."""
    experts: int = 0
    """Experts of the FFN (top 2); 0 = plain SwiGLU."""
    ffn_ratio: float = 8 / 3
    """Hidden width of the SwiGLU FFN as a multiple of ``width``, rounded up to a multiple of 64."""
    view_fusion: bool | str = True
    """Fusion of the views; true = gated, false = their mean, or the name of another registered one."""
    metadata: bool = True
    """Use GPS, weather, daytime, scene and text."""
    metadata_dropout: float = 0.3
    """Probability in training that a present field is replaced by null."""
    dropout: float = 0.1
    """Dropout of fusion and classifier."""
    mask_head: Literal["auto", "on", "off"] = "auto"
    """``auto`` = on if the training data has masks."""

    def __post_init__(self) -> None:
        check(self.width >= 64 and self.width % 64 == 0, "model.width", self.width, "a multiple of 64")
        divides_width = self.heads >= 1 and self.width % self.heads == 0
        check(divides_width, "model.heads", self.heads, f"a divisor of width {self.width}")
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        divides_heads = kv_heads >= 1 and self.heads % kv_heads == 0
        check(divides_heads, "model.kv_heads", kv_heads, f"a divisor of heads {self.heads}")
        check(0 < self.prune_keep <= 1, "model.prune_keep", self.prune_keep, "a share in (0, 1]")
        check(self.layers >= 0, "model.layers", self.layers, "an integer >= 0")
        check(self.ffn_ratio > 0, "model.ffn_ratio", self.ffn_ratio, "a number > 0")
        check(self.experts == 0 or self.experts >= 2, "model.experts", self.experts, "0 or >= 2")
        for name in ("metadata_dropout", "dropout"):
            value = getattr(self, name)
            check(0 <= value < 1, f"model.{name}", value, "a share in [0, 1)")


@settings("loss")
class LossConfig:
    """Terms of the loss and their weights."""

    weights: dict[str, float] | Literal["auto"] = "auto"
    """Weight of each part: focal, consistency, weather, dice, or any other registered one; auto = \
0.40/0.25/0.15/0.20 with masks, 0.50/0.30/0.20 without."""
    gamma: float = 2.0
    """Focusing exponent of the focal loss."""
    alpha: float = 0.25
    """Weight of the positive class in the focal loss; the negative class has 1 - alpha."""
    label_smoothing: float = 0.1
    """Label smoothing of the focal loss."""
    balance: float = 0.01
    """Weight of the experts' load-balancing loss."""

    def __post_init__(self) -> None:
        check(self.gamma >= 0, "loss.gamma", self.gamma, "a number >= 0")
        check(0 < self.alpha < 1, "loss.alpha", self.alpha, "a number in (0, 1)")
        check(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "in [0, 1)")
        if self.weights != "auto":
            is_usable = all(weight >= 0 for weight in self.weights.values()) and any(self.weights.values())
            check(is_usable, "loss.weights", self.weights, "numbers >= 0, one of them > 0")
        check(self.balance >= 0, "loss.balance", self.balance, "a number >= 0")


@settings("eval")
class EvalConfig:
    """Evaluation and the report."""

    bootstrap: int = 2000
    """Bootstrap resamples per interval."""
    worst: int = 10
    """Number of worst errors shown with their views."""
    report: bool = True
    """Write ``report.html`` at the end of training."""

    def __post_init__(self) -> None:
        check(self.bootstrap >= 100, "eval.bootstrap", self.bootstrap, "an integer >= 100")
        check(self.worst >= 0, "eval.worst", self.worst, "an integer >= 0")


@settings()
class ExperimentConfig(TrainConfig):
    """A whole experiment, from photos to a trained and evaluated detector and its report."""

    # Which photos are trained on, and how often each is drawn, is compared by what they are.
    free: ClassVar[frozenset[str]] = TrainConfig.free | {
        *("data", "gps", "eval", "views.select", "backbone.attention", "backbone.gradient_checkpointing"),
        *("features.dir", "features.batch_views", "features.on_device"),
    }

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
                "features of a backbone in training go stale; set features.mode to online or auto"
            )
        if self.augment.enabled and self.augment.copies == 0 and self.features.mode == "cached":
            raise ConfigError(
                "augment.copies is 0 (fresh draws every epoch) but features.mode is 'cached': "
                "set augment.copies to 1 or more, or features.mode to online or auto"
            )

    @property
    def keeps_features(self) -> bool:
        """Whether the backbone's features are stored, that is, the resolved ``features.mode``."""
        if self.features.mode != "auto":
            return self.features.mode == "cached"
        draws_every_epoch = self.augment.enabled and self.augment.copies == 0
        return self.backbone.trainable == "none" and not draws_every_epoch
