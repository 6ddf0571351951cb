"""A run with a distilled selector, and the crops that predict and evaluate then use."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from support.paths import ROOT
from support.photos import small_experiment, write_small_set
from torch import Tensor, nn

from roadwork_dist.cli.main import main
from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.yaml import to_yaml
from roadwork_dist.config.experiment import ViewsConfig
from roadwork_dist.datasets.boxed import view_boxes
from roadwork_dist.detector.backbone import load_backbone
from roadwork_dist.inference.predictor import Predictor, crops_to_select
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.photos.views import ViewGeometry
from roadwork_dist.recipes.pretrain import build_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("photos"))


def untrained_run(photos: Path, folder: Path, *, gates: bool) -> Path:
    """A run folder whose best weights are random; fresh gates are all alike."""
    config = small_experiment(photos, folder, "--model.metadata=false", "--model.prune_keep=1")
    model = build_model(config, load_backbone(config.backbone, device=CPU), mask_head=False)
    if gates:
        assert model.head.view_fusion is not None
        nn.init.normal_(model.head.view_fusion.gate.weight, std=3.0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    model.save_pretrained(folder / "best")
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = untrained_run(photos, tmp_path_factory.mktemp("run"), gates=True)
    assert main(["select-views", str(folder)]) == 0
    return folder


def test_select_views_keeps_a_selector_beside_the_weights(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "best" / "selector.safetensors").read_bytes()
    assert main(["distil", str(run / "best")]) == 0  # the command's word before version 0.2
    printed, told = capsys.readouterr()
    assert "distil is now called select-views" in told
    assert " photos, with early stopping on " in printed
    assert printed.rstrip().endswith(f"selector: {run / 'best' / 'selector.safetensors'}")
    # Again from the same features and weights, it is the same selector.
    assert (run / "best" / "selector.safetensors").read_bytes() == before


def test_evaluate_looks_at_some_crops_and_leaves_the_runs_own_figures_alone(run: Path) -> None:
    assert main(["evaluate", str(run), "--views.select", "4"]) == 0
    assert not (run / "evaluation.json").exists()
    results = json.loads((run / "evaluations" / "own-select-4.json").read_text())
    assert results["val"]["photos"] == 12
    gates = pd.read_parquet(run / "evaluations" / "own-select-4.parquet")["view_gates"]
    assert {len(row) for row in gates} == {12}
    assert {sum(gate > 0 for gate in row) for row in gates} == {5}
    assert all(row[0] > 0 for row in gates)
    # The threshold of four crops is the one that distilling chose for them.
    predictor = Predictor.from_pretrained(run, device="cpu", select=4)
    assert results["val"]["threshold"] == pytest.approx(predictor.threshold, abs=1e-4)


def test_predict_sends_the_global_view_and_the_crops_through_the_backbone(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from roadwork_dist.detector.backbone.timm_backbone import TimmBackbone

    seen: list[int] = []
    for name in ("_extract", "_extract_cells"):
        whole = getattr(TimmBackbone, name)

        def counting(self: TimmBackbone, images: Tensor, whole: object = whole) -> object:
            seen.append(len(images))
            return whole(self, images)  # type: ignore[operator]

        monkeypatch.setattr(TimmBackbone, name, counting)
    paths = sorted(str(path) for path in (photos / "images").glob("val-*"))[:3]
    output = tmp_path / "p.jsonl"
    command = ["predict", "--model", str(run), "--output", str(output), "--workers", "0", *paths]
    assert main([*command, "--views.select", "2"]) == 0
    assert seen == [3, 6]
    assert main([*command, "--select", "11"]) == 0
    assert seen == [3, 6, 36]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(sum(gate > 0 for gate in row["view_gates"]) == 12 for row in rows)


def test_what_is_missing_is_told(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = untrained_run(photos, tmp_path / "fresh", gates=False)
    assert main(["evaluate", str(folder), "--views.select", "4"]) == 2
    told = capsys.readouterr().err
    assert f"views.select needs it: run `roadwork-dist select-views {folder}`" in told
    assert main(["select-views", str(folder)]) == 2
    assert "gates do not differ between crops" in capsys.readouterr().err
    assert main(["predict", "--model", str(folder), "--output", "p.csv", "--views.select", "0", "x"]) == 2


def test_boxes_are_shares_of_the_upright_photo() -> None:
    views = PhotoViews(ViewGeometry(64))
    boxes = view_boxes(views, 400, 300)
    assert boxes.shape == (12, 4)
    assert boxes[0].tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(boxes[10], torch.tensor([0.125, 0.0, 0.75, 1.0]))  # the centre square
    torch.testing.assert_close(boxes[11], torch.tensor([0.25, 0.0, 0.75, 1.0]))  # the rightmost one
    # A portrait photo is the same, transposed; a small one has the boxes of a large one.
    torch.testing.assert_close(view_boxes(views, 300, 400), boxes[:, [1, 0, 3, 2]])
    torch.testing.assert_close(view_boxes(views, 80, 60), view_boxes(views, 4000, 3000), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("settings", "asked", "crops"),
    [
        ({}, None, None),
        ({}, 4, 4),
        ({"select": 4}, None, 4),
        ({"select": 4}, 2, 2),
        ({"select": 4}, 11, None),  # all there are
        ({"select": 11}, None, None),
        ({"select": 4, "policy": "global"}, None, None),
        ({"grid": 4}, 11, 11),  # 4 x 4 tiles and two squares are 18 crops
    ],
)
def test_how_many_crops_are_selected(settings: dict[str, Any], asked: int | None, crops: int | None) -> None:
    assert crops_to_select(ViewsConfig(**settings), asked) == crops


def test_selecting_no_crop_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"views\.select.*0.*null or an integer >= 1"):
        ViewsConfig(select=0)


def test_the_benchmark_prints_its_tables(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = import_module("data_select")
    settings = "--draws 2 --resamples 50 --photos 1 --turns 2"
    assert benchmark.main([str(run), *settings.split(), "--svg", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "AUROC, val: 12 photos" in printed
    cost = [line.split("|") for line in printed.splitlines() if line.startswith("| 4 | 5 |")]
    assert len(cost) == 1
    # With all crops, every choice is the same.
    all_crops = [line for line in printed.splitlines() if line.startswith("| 11 |") and "…" in line]
    assert len(all_crops) == 4  # two figures of two splits
    assert all(len({cell.strip() for cell in line.split("|")[2:-1]}) == 1 for line in all_crops)
    assert (tmp_path / "view-selection-mcc.svg").read_text().startswith("<svg xmlns=")
