"""Every setting of training, typed, documented and checked before anything is allocated.

``TrainConfig`` is all that :class:`roadwork_dist.Trainer` needs, for any model;
:mod:`roadwork_dist.config.experiment` adds what the roadwork detector needs. Settings are frozen:
what ran is what the run folder's ``config.yaml`` says.
"""

from dataclasses import field
from typing import ClassVar, Literal

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.settings import settings


def check(condition: bool, name: str, got: object, expected: str) -> None:
    """Refuse a setting.

    Raises:
        ConfigError: ``condition`` does not hold; names the setting, what was got and what was expected.
    """
    if not condition:
        raise ConfigError(f"{name} is {got!r}, expected {expected}")


@settings("optim")
class OptimConfig:
    """Optimizer and gradient clipping."""

    name: str = "adamw"
    """Registered optimizer; see ``roadwork_dist.trainer.optim.optimizers``."""
    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay; none on biases, norms and embeddings."""
    layer_decay: float = 1.0
    """Learning rate of each layer as a share of the one above it; 1 = all alike."""
    clip: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""

    def __post_init__(self) -> None:
        check(self.lr > 0, "optim.lr", self.lr, "a number > 0")
        check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "a number >= 0")
        check(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "a number in (0, 1]")
        check(self.clip >= 0, "optim.clip", self.clip, "a number >= 0 (0 = off)")
        check(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "two numbers in [0, 1)")
        check(self.eps > 0, "optim.eps", self.eps, "a number > 0")


@settings("schedule")
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
        check(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "an integer >= 0")
        check(0 <= self.final_ratio <= 1, "schedule.final_ratio", self.final_ratio, "a share in [0, 1]")
        check(0 < self.decay_share <= 1, "schedule.decay_share", self.decay_share, "a share in (0, 1]")


@settings("ema")
class EmaConfig:
    """Exponential moving average of the trained weights, kept in fp32, used for validation."""

    enabled: bool = True
    """Keep an average at all."""
    decay: float = 0.9999
    """Decay per optimizer step once warmed up."""
    warmup: bool = True
    """Use min(decay, (1 + step) / (10 + step))."""

    def __post_init__(self) -> None:
        check(0 < self.decay < 1, "ema.decay", self.decay, "a number in (0, 1)")


@settings("spike")
class SpikeConfig:
    """What happens when the loss of a step rises far above those before it."""

    action: Literal["off", "skip", "rewind", "stop"] = "off"
    """``skip`` = the step is not taken; ``rewind`` = neither are those since the last checkpoint."""
    window: int = 100
    """Accepted steps whose losses a loss is compared with."""
    threshold: float = 10.0
    """Robust standard deviations (1.4826 x the median absolute deviation) above their median."""

    def __post_init__(self) -> None:
        check(self.window >= 2, "spike.window", self.window, "an integer >= 2")
        check(self.threshold > 0, "spike.threshold", self.threshold, "a number > 0")


@settings("checkpoint")
class CheckpointConfig:
    """When training state is saved and how much of it is kept."""

    every_steps: int = 0
    """Save every so many optimizer steps; 0 = at the end of each epoch only."""
    keep: int = 2
    """Newest checkpoints kept; the best is kept besides."""
    asynchronous: bool = False
    """Write in the background: training waits only for a copy of its state in host memory."""

    def __post_init__(self) -> None:
        check(self.every_steps >= 0, "checkpoint.every_steps", self.every_steps, "an integer >= 0")
        check(self.keep >= 1, "checkpoint.keep", self.keep, "an integer >= 1")


@settings("tracking.wandb")
class WandbConfig:
    """Weights & Biases; one run for all ranks."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """``offline`` writes below the run folder, to be sent later with ``wandb sync``."""
    project: str = "roadwork_dist"
    """Project name."""
    entity: str | None = None
    """Team or user; null = the account's own."""


@settings("tracking")
class TrackingConfig:
    """Where figures go besides ``metrics.jsonl``, which is always written."""

    tensorboard: bool = False
    """Write TensorBoard events below the run folder."""
    progress: bool = True
    """Show progress: a live bar on a terminal, plain lines elsewhere."""
    health_every: int = 50
    """Tell throughput, step times, memory and the slowest rank every so many steps, and per epoch."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""

    def __post_init__(self) -> None:
        check(self.health_every >= 0, "tracking.health_every", self.health_every, "an integer >= 0")


@settings()
class TrainConfig:
    """What the Trainer needs to train any ``nn.Module``.

    Attributes:
        free: settings and groups that may be others when a run is resumed: no weight depends on them, or
            (epochs, rows of a step) they have rules of their own.
    """

    free: ClassVar[frozenset[str]] = frozenset(
        {
            *("output_dir", "resume", "epochs", "batch_size", "accumulation", "batch_size_search", "seed"),
            *("workers", "compile", "compile_regions", "patience", "max_nonfinite_steps", "hang_timeout"),
            *("device", "checkpoint", "tracking", "spike", "ema.enabled"),
        }
    )

    output_dir: str = "runs/default"
    """Run folder: resolved config, metrics, checkpoints, best weights, report."""
    resume: Literal["auto", "never", "force"] = "auto"
    """``auto`` resumes from the newest intact checkpoint with the recipe that the run was started with;
    ``force`` takes another recipe; ``never`` refuses a folder that has a checkpoint."""
    seed: int = 42
    """Seeds every random draw."""
    epochs: int = 30
    """Passes over the training data."""
    batch_size: int = 32
    """Rows per process and micro-batch."""
    accumulation: int = 1
    """Micro-batches per optimizer step."""
    batch_size_search: Literal["off", "largest"] = "off"
    """``largest`` tries how many rows fit and deals batch_size x accumulation out in as few parts."""
    workers: int = 0
    """Loader processes per training process."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """bf16 = autocast of the forward pass; weights stay in fp32. fp8 = besides, linear layers of repeated \
blocks multiply in 8 bits (torchao; Ada, Hopper and newer)."""
    compile: Literal["off", "default", "max-autotune"] = "off"
    """torch.compile mode of the trained model."""
    compile_regions: bool = True
    """Compile each repeated block (they share one compiled code) instead of the whole model."""
    monitor: str = "mcc"
    """Validation figure that chooses the best weights, higher is better; ``-loss`` for the loss."""
    patience: int = 5
    """Stop after so many validations without a better figure; 0 = never."""
    max_nonfinite_steps: int = 5
    """Stop after so many skipped (non-finite) steps in a row."""
    hang_timeout: float = 480.0
    """End a run that has not moved for so many seconds, naming the rank that hangs; 0 = wait for ever.

    Above the longest save and compilation; below 500, or NCCL's own watchdog (600 s) ends the run first."""
    device: Literal["auto", "cpu"] = "auto"
    """``cpu`` ignores GPUs."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    spike: SpikeConfig = field(default_factory=SpikeConfig)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulation", "max_nonfinite_steps"):
            value = getattr(self, name)
            check(value >= 1, name, value, "an integer >= 1")
        for name in ("workers", "patience", "seed"):
            value = getattr(self, name)
            check(value >= 0, name, value, "an integer >= 0")
        check(self.hang_timeout >= 0, "hang_timeout", self.hang_timeout, "seconds >= 0 (0 = off)")
