"""Runs, models and feature stores written before the modules were moved still work.

``earlier_version/`` was written by version 0.1.0 (see its README) and contains class names, module
paths and cache keys of that version.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.toy import NoisyData, lines, toy_data, toy_model

from roadwork_dist import Callback, Predictor, Trainer
from roadwork_dist.config.io import parse_experiment
from roadwork_dist.features.masks import mask_targets
from roadwork_dist.features.text import TextCache, embed_descriptions
from roadwork_dist.photos.images import FileImage
from roadwork_dist.photos.mask_images import PngMask
from roadwork_dist.recipes.pretrain import run_experiment

EARLIER = Path(__file__).parent / "earlier_version"


class Counter(Callback):
    """A callback of a user, with state and a tensor; its class name is in the checkpoint."""

    def __init__(self) -> None:
        self.steps = 0
        self.read: list[float] = []

    def on_step_end(self, run: Any, result: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"steps": torch.tensor([float(self.steps)])}

    def load_tensors(self, source: Any) -> None:
        steps = torch.zeros(1)
        source.read({"steps": steps})
        self.read.append(float(steps))


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A copy: runs and stores are written to."""
    return Path(shutil.copytree(EARLIER, tmp_path / "earlier"))


def test_a_run_goes_on_with_average_spike_guard_and_a_callback_of_the_user(earlier: Path) -> None:
    config = parse_toy(earlier / "toy")
    counter = Counter()
    trainer = Trainer(toy_model(0.2), config, NoisyData(40), toy_data(20, seed=2), callbacks=[counter]).fit()
    assert trainer.state.step == 15
    assert counter.steps == 15
    assert counter.read == [8.0]  # a tensor of the checkpoint at step 8
    undisturbed = [json.loads(line) for line in (EARLIER / "toy/undisturbed.jsonl").read_text().splitlines()]
    figures = {(line["kind"], line["step"]): line["loss"] for line in undisturbed if "loss" in line}
    told = {(line["kind"], line["step"]): line["loss"] for line in lines(earlier / "toy") if "loss" in line}
    # The validations' losses are those of the average. Another processor may round differently.
    assert told == pytest.approx(figures, rel=1e-4)


def parse_toy(folder: Path) -> Any:
    """The run's own settings, in the folder that it was copied to."""
    from roadwork_dist.config.io import parse_settings
    from roadwork_dist.trainer.config import TrainConfig

    return parse_settings(TrainConfig, ["--config", str(folder / "config.yaml"), f"--output_dir={folder}"])


def test_a_model_predicts_what_it_did(earlier: Path) -> None:
    predictor = Predictor.from_pretrained(earlier / "detector" / "best", device="cpu")
    logits = json.loads((EARLIER / "detector/logits.json").read_text())
    photos = {name: earlier / "photos/images" / f"{name}.jpg" for name in logits}
    predictions = predictor.predict(list(photos.values()))
    expected = torch.tensor(list(logits.values())).softmax(1)[:, 1]
    got = torch.tensor([prediction.probability for prediction in predictions])
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)  # features were kept in bf16


def test_a_feature_store_is_found(
    earlier: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(earlier)
    run_experiment(parse_experiment(["--config", "detector/config.yaml", "--eval.report=false"]))
    told = capsys.readouterr().out
    for split, photos in (("train", 8), ("val", 4), ("target", 4)):
        assert f"features of photos/{split}.csv: {photos} of {photos}" in told
        assert f"{photos} were there" in told


def test_masks_and_texts_of_a_feature_store_are_found(earlier: Path) -> None:
    before = sorted(earlier.rglob("*.safetensors"))
    mask = PngMask(FileImage(EARLIER / "photos/masks/train-00000.png"))
    assert mask_targets([mask], earlier / "features")[0] is not None
    assert sorted(earlier.rglob("*.safetensors")) == before, "the target was computed again"

    def encode(texts: list[str]) -> torch.Tensor:
        raise AssertionError(f"{texts} were encoded again")

    texts = embed_descriptions(
        ["cones on the road", None, "an empty street"], encode, TextCache(earlier / "features", "an encoder")
    )
    assert texts.known.tolist() == [True, False, True]
