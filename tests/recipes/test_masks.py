"""Photos whose masks cannot be used are left out, with and without cached features."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from support import ranks
from support.shards import write_photos

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.io import parse_experiment
from roadwork_dist.datasets.dataset import RoadworkDataset
from roadwork_dist.detector.backbone import build_random
from roadwork_dist.detector.backbone.base import Backbone
from roadwork_dist.features.tensor_file import checksum
from roadwork_dist.recipes.data import DatasetBuilder
from roadwork_dist.sources import load_manifest

FAULTY = ["id/3", "id/9"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Twelve photos, four with a mask: the second's is broken, the fourth's lies on its side."""
    table = write_photos(tmp_path / "photos")
    broken, turned = (table.parent / f"mask-{number}.png" for number in (3, 9))
    broken.write_bytes(broken.read_bytes()[:60])
    Image.open(turned).transpose(Image.Transpose.ROTATE_90).save(turned)
    return table


def build(table: Path, mode: str, *, max_share: float = 0.2) -> RoadworkDataset:
    settings: dict[str, Any] = {
        "data.max_unreadable_share": max_share,
        "features.mode": mode,
        "features.dir": table.parent / "features",
        "model.metadata": "false",
        "views.size": 64,
        "views.policy": "global",
        "workers": 0,
        "device": "cpu",
    }
    config = parse_experiment([f"--{name}={value}" for name, value in settings.items()])
    backbone = build_random("efficientnet_lite0", device=torch.device("cpu"), dtype=torch.float32)
    manifest = load_manifest(str(table), config.data, name="train")
    return DatasetBuilder(config, backbone, Accelerator(cpu=True), masks=True).build(manifest, augment=False)


def ids_and_masks(table: Path, mode: str) -> tuple[list[str], list[str]]:
    data = build(table, mode)
    return list(data.manifest.ids), [checksum(data[row]["mask"]) for row in range(len(data))]


def test_they_are_left_out_of_kept_features_as_online(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    online = ids_and_masks(table, "online")
    assert online[0] == [f"id/{number}" for number in range(12) if f"id/{number}" not in FAULTY]
    for _ in ("computed", "found"):
        caplog.clear()
        assert ids_and_masks(table, "cached") == online
        assert "left out 2 of 12 photos" in caplog.text
        assert "mask-3.png: is broken" in caplog.text
        assert "mask-9.png: mask has 72x96 px but the upright photo 96x72" in caplog.text


def test_all_processes_leave_out_the_same(table: Path) -> None:
    expected = ids_and_masks(table, "online")
    for each in ranks.run(ids_and_masks, table, "cached", world_size=2):
        assert each == expected


def test_too_many_stop_the_run_before_features_are_computed(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backbone, "forward", lambda *_: pytest.fail("computed"))
    with pytest.raises(DataError, match=r"2 of 12 photos \(16\.7%\) are unreadable.*mask-3\.png"):
        build(table, "cached", max_share=0.1)


def test_one_mask_may_be_right_for_one_photo_and_turned_for_another(table: Path) -> None:
    right, other = (table.parent / name for name in ("photo-0.jpg", "photo-6.jpg"))
    Image.open(right).transpose(Image.Transpose.ROTATE_90).save(other)
    (table.parent / "mask-6.png").write_bytes((table.parent / "mask-0.png").read_bytes())
    for _ in ("computed", "found"):
        data = [build(table, mode, max_share=0.3) for mode in ("cached", "online")]
        assert data[0].manifest.ids == data[1].manifest.ids
        assert {"id/0", "id/6"} & set(data[0].manifest.ids) == {"id/0"}
