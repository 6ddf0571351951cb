"""Training the whole backbone with every sharding strategy."""

from pathlib import Path

import pytest
import torch
from support.engines import train_with
from support.photos import small_experiment, write_small_set
from support.ranks import run
from support.toy import lines

from roadwork_dist.recipes.pretrain import build_experiment


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv3 of three blocks with random weights, as ``save_pretrained`` writes it."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    folder = tmp_path_factory.mktemp("dinov3")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = DINOv3ViTConfig(patch_size=16, num_register_tokens=4, **sizes)
    DINOv3ViTModel(config).save_pretrained(folder)
    return folder


def fit(photos: Path, backbone: Path, run_dir: Path, *overrides: str) -> None:
    """Twelve photos in two epochs; no evaluation, which other tests are about."""
    settings = (
        *(
            f"--backbone.name={backbone}",
            "--backbone.trainable=all",
            "--backbone.gradient_checkpointing=true",
        ),
        *("--backbone.dtype=fp32", "--features.mode=online", "--views.policy=global", "--views.size=64"),
        *("--model.prune_keep=1.0", "--model.dropout=0", "--model.metadata_dropout=0", "--epochs=2"),
        *("--optim.layer_decay=0.8", *overrides),
    )
    build_experiment(small_experiment(photos, run_dir, *settings)).trainer.fit()


@pytest.fixture(scope="module")
def one_process(photos: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run(fit, photos, backbone, folder, "--backbone.gradient_checkpointing=false")
    return folder


def figures(run_dir: Path, name: str) -> torch.Tensor:
    return torch.tensor([line[name] for line in lines(run_dir) if line["kind"] == "train"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_it_learns_as_in_one_process(
    photos: Path, backbone: Path, one_process: Path, tmp_path: Path, engine: str
) -> None:
    run(train_with, engine, fit, photos, backbone, tmp_path, "--batch_size=4", world_size=2)
    assert len(figures(one_process, "loss")) >= 4
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(figures(tmp_path, name), figures(one_process, name), rtol=2e-5, atol=2e-6)
