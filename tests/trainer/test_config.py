"""Settings are checked before anything is allocated."""

from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.config import experiment
from roadwork_dist.config.experiment import (
    AugmentConfig,
    BackboneConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    FeaturesConfig,
    GpsConfig,
    LossConfig,
    ModelConfig,
    ViewsConfig,
)
from roadwork_dist.trainer import config as train_config
from roadwork_dist.trainer.config import CheckpointConfig, EmaConfig, OptimConfig, ScheduleConfig, TrainConfig


@pytest.mark.parametrize(
    ("kind", "name", "value", "told"),
    [
        (OptimConfig, "lr", 0.0, "optim.lr is 0.0, expected a number > 0"),
        (OptimConfig, "lr", float("nan"), "optim.lr is nan"),
        (OptimConfig, "weight_decay", -0.1, "optim.weight_decay is -0.1"),
        (OptimConfig, "layer_decay", 0.0, "optim.layer_decay is 0.0"),
        (OptimConfig, "clip", -1.0, "optim.clip is -1.0"),
        (OptimConfig, "betas", (0.9, 1.0), "optim.betas is"),
        (OptimConfig, "eps", 0.0, "optim.eps is 0.0"),
        (ScheduleConfig, "warmup_steps", -1, "schedule.warmup_steps is -1"),
        (ScheduleConfig, "final_ratio", 1.1, "schedule.final_ratio is 1.1"),
        (ScheduleConfig, "decay_share", 0.0, "schedule.decay_share is 0.0"),
        (EmaConfig, "decay", 1.0, "ema.decay is 1.0"),
        (CheckpointConfig, "every_steps", -1, "checkpoint.every_steps is -1"),
        (CheckpointConfig, "keep", 0, "checkpoint.keep is 0"),
        (TrainConfig, "epochs", 0, "epochs is 0, expected an integer >= 1"),
        (TrainConfig, "batch_size", 0, "batch_size is 0"),
        (TrainConfig, "accumulation", 0, "accumulation is 0"),
        (TrainConfig, "max_nonfinite_steps", 0, "max_nonfinite_steps is 0"),
        (TrainConfig, "workers", -1, "workers is -1"),
        (TrainConfig, "patience", -1, "patience is -1"),
        (TrainConfig, "seed", -1, "seed is -1"),
        (DataConfig, "val_share", 1.0, "data.val_share is 1.0"),
        (DataConfig, "max_unreadable_share", 1.5, "data.max_unreadable_share is 1.5"),
        (DataConfig, "max_pixels", 0, "data.max_pixels is 0"),
        (ViewsConfig, "size", 16, "views.size is 16, expected 'auto' or"),
        (ViewsConfig, "grid", 0, "views.grid is 0"),
        (ViewsConfig, "scale", 0.5, "views.scale is 0.5"),
        (AugmentConfig, "strength", -1.0, "augment.strength is -1.0"),
        (AugmentConfig, "copies", -1, "augment.copies is -1"),
        (AugmentConfig, "mix_alpha", 0.0, "augment.mix_alpha is 0.0, expected 'auto' or"),
        (AugmentConfig, "mix_share", 1.5, "augment.mix_share is 1.5"),
        (GpsConfig, "clusters", 0, "gps.clusters is 0"),
        (GpsConfig, "near_weight", 0.0, "gps.near_weight is 0.0"),
        (GpsConfig, "min_share_100km", 2.0, "gps.min_share_100km is 2.0"),
        (BackboneConfig, "last_n", 0, "backbone.last_n is 0"),
        (FeaturesConfig, "batch_views", 0, "features.batch_views is 0"),
        (ModelConfig, "width", 100, "model.width is 100, expected a multiple of 64"),
        (ModelConfig, "width", 0, "model.width is 0"),
        (ModelConfig, "heads", 7, "model.heads is 7, expected a divisor of width 512"),
        (ModelConfig, "heads", 0, "model.heads is 0"),
        (ModelConfig, "kv_heads", 3, "model.kv_heads is 3, expected a divisor of heads 8"),
        (ModelConfig, "kv_heads", 0, "model.kv_heads is 0"),
        (ModelConfig, "prune_keep", 0.0, "model.prune_keep is 0.0"),
        (ModelConfig, "layers", -1, "model.layers is -1"),
        (ModelConfig, "experts", 1, "model.experts is 1, expected 0 or >= 2"),
        (ModelConfig, "ffn_ratio", 0.0, "model.ffn_ratio is 0.0"),
        (ModelConfig, "dropout", 1.0, "model.dropout is 1.0"),
        (ModelConfig, "metadata_dropout", -0.1, "model.metadata_dropout is -0.1"),
        (LossConfig, "gamma", -1.0, "loss.gamma is -1.0"),
        (LossConfig, "alpha", 1.0, "loss.alpha is 1.0"),
        (LossConfig, "label_smoothing", 1.0, "loss.label_smoothing is 1.0"),
        (LossConfig, "weights", {"focal": -1.0}, "numbers >= 0, one of them > 0"),
        (LossConfig, "weights", {}, "numbers >= 0, one of them > 0"),
        (LossConfig, "balance", -1.0, "loss.balance is -1.0"),
        (EvalConfig, "bootstrap", 10, "eval.bootstrap is 10"),
        (EvalConfig, "worst", -1, "eval.worst is -1"),
    ],
)
def test_a_value_out_of_its_range_is_told(kind: Any, name: str, value: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{name: value})
    assert told in str(caught.value)


@pytest.mark.parametrize("trainable", ["last_n", "all"])
def test_a_learning_backbone_needs_online_features(trainable: Any) -> None:
    backbone = BackboneConfig(trainable=trainable)
    with pytest.raises(ConfigError, match=r"features of a backbone in training go stale; set features\.mode"):
        ExperimentConfig(backbone=backbone, features=FeaturesConfig(mode="cached"))
    for mode in ("online", "auto"):
        assert not ExperimentConfig(backbone=backbone, features=FeaturesConfig(mode=mode)).keeps_features


def test_fresh_draws_every_epoch_need_online_features() -> None:
    fresh = AugmentConfig(copies=0)
    with pytest.raises(ConfigError, match=r"augment\.copies is 0 \(fresh draws every epoch\)"):
        ExperimentConfig(augment=fresh, features=FeaturesConfig(mode="cached"))
    for mode in ("online", "auto"):
        assert not ExperimentConfig(augment=fresh, features=FeaturesConfig(mode=mode)).keeps_features
    assert ExperimentConfig(augment=AugmentConfig(copies=0, enabled=False)).keeps_features


def test_features_of_a_frozen_backbone_are_kept_unless_told_otherwise() -> None:
    assert ExperimentConfig().features.mode == "auto"
    assert ExperimentConfig().keeps_features
    assert not ExperimentConfig(features=FeaturesConfig(mode="online")).keeps_features


def test_the_recipe_of_pre_training_is_the_default() -> None:
    config = ExperimentConfig()
    assert (config.epochs, config.batch_size, config.seed, config.patience) == (30, 32, 42, 5)
    assert (config.optim.lr, config.optim.betas, config.optim.eps) == (3e-4, (0.9, 0.999), 1e-8)
    assert (config.optim.weight_decay, config.optim.clip) == (0.01, 1.0)
    assert (config.schedule.name, config.schedule.warmup_steps) == ("cosine", 500)
    assert (config.ema.decay, config.monitor) == (0.9999, "mcc")


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ExperimentConfig().epochs = 3  # type: ignore[misc]


def test_every_config_is_a_frozen_dataclass_of_keywords() -> None:
    found = {**vars(train_config), **vars(experiment)}.values()
    kinds = [k for k in found if isinstance(k, type) and k.__name__.endswith("Config")]
    assert len(kinds) > 10
    for kind in kinds:
        assert is_dataclass(kind)
        assert kind.__dataclass_params__.frozen, kind  # type: ignore[attr-defined]
        assert all(item.kw_only for item in fields(kind)), kind


@pytest.mark.parametrize(
    ("kind", "name", "value", "told"),
    [
        (TrainConfig, "precision", "fp16", "precision is 'fp16', expected 'fp32', 'bf16' or 'fp8'"),
        (TrainConfig, "resume", False, "resume is False, expected 'auto', 'never' or 'force'"),
        (TrainConfig, "compile", True, "compile is True, expected 'off', 'default' or 'max-autotune'"),
        (TrainConfig, "device", "cuda", "device is 'cuda', expected 'auto' or 'cpu'"),
        (TrainConfig, "epochs", 1.5, "epochs is 1.5, expected a whole number"),
        (TrainConfig, "epochs", True, "epochs is True, expected a whole number"),
        (TrainConfig, "output_dir", 1, "output_dir is 1, expected a text"),
        (TrainConfig, "optim", {"lr": 1.0}, "expected OptimConfig"),
        (OptimConfig, "betas", [0.9, 0.99], "optim.betas is [0.9, 0.99], expected tuple[float, float]"),
        (OptimConfig, "lr", "1e-3", "optim.lr is '1e-3', expected a number"),
        (ModelConfig, "kv_heads", "8", "model.kv_heads is '8', expected a whole number or null"),
        (ModelConfig, "view_fusion", 1, "model.view_fusion is 1, expected true or false or a text"),
        (
            LossConfig,
            "weights",
            {"focal": "much"},
            "loss.weights is {'focal': 'much'}, expected dict[str, float]",
        ),
    ],
)
def test_a_value_of_another_type_or_choice_is_told(kind: Any, name: str, value: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{name: value})
    assert told in str(caught.value)


def test_scalars_of_numpy_and_whole_numbers_for_numbers_are_taken() -> None:
    config = TrainConfig(epochs=np.int64(3), optim=OptimConfig(lr=1, eps=np.float32(0.5)))  # type: ignore[arg-type]
    assert type(config.epochs) is int
    assert type(config.optim.eps) is float
    assert config.optim.lr == 1
    assert TrainConfig(output_dir=Path("runs") / "mine").output_dir == "runs/mine"  # type: ignore[arg-type]
