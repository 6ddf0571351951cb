"""The predictor against the components that it uses."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import roadwork_dist
from roadwork_dist.common.errors import BackboneError, CheckpointError, ConfigError
from roadwork_dist.config.experiment import BackboneConfig, ModelConfig, ViewsConfig
from roadwork_dist.datasets.dataset import RoadworkDataset, collate
from roadwork_dist.detector.backbone import Backbone, load_backbone
from roadwork_dist.detector.detector import RoadworkHead, RoadworkModel
from roadwork_dist.detector.text import load_text_encoder
from roadwork_dist.features.text import embed_descriptions
from roadwork_dist.inference.predictor import Predictor, Unreadable, plain_views
from roadwork_dist.photos.images import BytesImage
from roadwork_dist.photos.manifest import Manifest, Sample

BACKBONE = BackboneConfig(name="efficientnet_lite0", dtype="fp32")
VIEWS = ViewsConfig(size=64, policy="auto")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(BACKBONE, device=CPU)


@pytest.fixture(scope="module")
def saved(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``best/`` of a head with random weights."""
    folder = tmp_path_factory.mktemp("run") / "best"
    torch.manual_seed(3)
    config = ModelConfig(width=64, heads=1, layers=1)
    model = RoadworkModel(RoadworkHead(backbone.width, config, mask_head=False), None)
    model.save_pretrained(
        folder,
        backbone_identity={"sha256": backbone.identity, **asdict(BACKBONE)},
        extra={"views": asdict(VIEWS), "text_encoder": "all-minilm-l6-v2", "synthetic": True},
    )
    (folder / "decision.json").write_text('{"threshold": 0.25, "chosen_on": "val"}')
    return folder


@pytest.fixture(scope="module")
def predictor(saved: Path) -> Predictor:
    return Predictor.from_pretrained(saved, device="cpu")


def photo(size: tuple[int, int], colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def samples() -> list[Sample]:
    large, small = photo((200, 150), "orange"), photo((80, 70), "grey")
    return [
        Sample(id="large", image=BytesImage("large", large)),
        Sample(id="small", image=BytesImage("small", small), label=1, weather="rainy"),
        Sample(id="placed", image=BytesImage("placed", large), latitude=40.0, longitude=-75.0),
        Sample(id="told", image=BytesImage("told", large), description="cones on the road", scene="urban"),
    ]


def test_it_is_the_model_on_the_views_and_metadata(
    predictor: Predictor, saved: Path, backbone: Backbone
) -> None:
    manifest = Manifest("mine", tuple(samples()))
    text = embed_descriptions([s.description for s in manifest], load_text_encoder())
    dataset = RoadworkDataset(manifest, views=plain_views(VIEWS, backbone), text=text)
    model = RoadworkModel.from_pretrained(saved, backbone=backbone)
    with torch.no_grad():
        output = model(collate([dataset[row] for row in range(4)]))
    found = list(predictor.predict(manifest, batch_size=4))
    assert [p.id for p in found] == ["large", "small", "placed", "told"]
    expected = output.logits.double().softmax(dim=1)[:, 1]
    torch.testing.assert_close(torch.tensor([p.probability for p in found]), expected.float())
    torch.testing.assert_close(torch.tensor([[p.logit_0, p.logit_1] for p in found]), output.logits)
    assert [len(p.view_gates) for p in found] == [12, 1, 12, 12]  # 80x70 px: the global view only
    torch.testing.assert_close(torch.tensor(found[0].view_gates), output.view_gates[0])
    assert sum(gate == 0 for gate in found[0].view_gates) == 4  # pruned
    # The same photo, with other metadata: none of it may be lost on the way.
    assert len({found[0].probability, found[2].probability, found[3].probability}) == 3


def test_batches_and_workers_change_nothing(predictor: Predictor) -> None:
    whole = list(predictor.predict(samples(), batch_size=4))
    for settings in ({"batch_size": 1}, {"batch_size": 3, "workers": 2}):
        for one, other in zip(predictor.predict(samples(), **settings), whole, strict=True):
            assert one.id == other.id
            assert one.probability == pytest.approx(other.probability, abs=1e-6)


def test_the_threshold_beside_the_weights_decides(predictor: Predictor, saved: Path) -> None:
    assert predictor.threshold == 0.25
    chosen = Predictor(predictor.model, predictor.views, threshold=0.25)
    (first, *_) = chosen.predict(samples()[:1])
    assert first.prediction == int(first.probability > 0.25)
    chosen.threshold = first.probability
    assert next(iter(chosen.predict(samples()[:1]))).prediction == 0  # above, not at
    chosen.threshold = first.probability - 1e-6
    assert next(iter(chosen.predict(samples()[:1]))).prediction == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_photos_do_not_stop_the_others(
    predictor: Predictor, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    good, broken = tmp_path / "good.png", tmp_path / "broken.png"
    good.write_bytes(photo((80, 80), "red"))
    broken.write_bytes(good.read_bytes()[:60])
    paths = [broken, tmp_path / "missing.png", good, str(broken), str(good)]
    told: list[Unreadable] = []
    found = list(predictor.predict(paths, batch_size=2, workers=workers, on_error=told.append))
    assert [p.id for p in found] == [str(good)] * 2
    assert [t.id for t in told] == [str(broken), str(tmp_path / "missing.png"), str(broken)]
    assert all(t.reason.startswith(t.id) for t in told)
    assert not caplog.records
    assert not list(predictor.predict(broken))  # one path is one photo, not its letters
    assert "left out: " in caplog.text


def test_results_come_batch_by_batch(predictor: Predictor) -> None:
    told: list[Unreadable] = []
    broken = Sample(id="last", image=BytesImage("last", b""))
    results = predictor.predict([*samples()[:2], broken], batch_size=1, on_error=told.append)
    assert next(results).id == "large"
    assert not told


def test_a_run_folder_will_do_and_lazily_exported_names(saved: Path) -> None:
    assert roadwork_dist.Predictor is Predictor
    assert roadwork_dist.RoadworkModel is RoadworkModel
    loaded = Predictor.from_pretrained(saved.parent, device="cpu")
    assert loaded.threshold == 0.25
    assert not loaded.model.training


def edit(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (edit(lambda c: c["backbone"].update(sha256="1" * 64)), CheckpointError, "has other weights"),
        (edit(lambda c: c["backbone"].clear()), CheckpointError, "does not identify the backbone"),
        (edit(lambda c: c["backbone"].update(nonsense=1)), CheckpointError, "does not identify the backbone"),
        (edit(lambda c: c["backbone"].update(name="./gone")), BackboneError, "gone is not a folder"),
        (edit(lambda c: c["extra"].clear()), CheckpointError, "does not say how photos are cut into views"),
        (lambda f: (f / "decision.json").write_text("{}"), CheckpointError, "decision.json cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), CheckpointError, "cannot be read"),
        (lambda f: (f / "config.json").unlink(), CheckpointError, "holds no saved model"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    saved: Path, tmp_path: Path, spoil: Callable[[Path], object], error: type[Exception], says: str
) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path)
    with pytest.raises(error, match=says) as caught:
        Predictor.from_pretrained(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_wrong_arguments_are_refused(predictor: Predictor, saved: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size is 0"):
        predictor.predict(samples(), batch_size=0)
    with pytest.raises(ConfigError, match="device 'abacus' cannot be used"):
        Predictor.from_pretrained(saved, device="abacus")


def test_weights_of_a_trained_backbone_are_loaded(backbone: Backbone, tmp_path: Path) -> None:
    settings = replace(BACKBONE, trainable="last_n", last_n=1)
    trained = load_backbone(settings, device=CPU)
    names = [name for name, p in trained.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for name in names:
            trained.get_parameter(name).mul_(1.5)
    head = RoadworkHead(trained.width, ModelConfig(width=64, heads=1, layers=0), mask_head=False)
    RoadworkModel(head, trained).save_pretrained(
        tmp_path,
        backbone_identity={"sha256": trained.identity, **asdict(settings)},
        extra={"views": asdict(VIEWS)},
    )
    loaded = Predictor.from_pretrained(tmp_path, device="cpu").model.backbone
    assert loaded is not None
    for name in names:
        assert torch.equal(loaded.get_parameter(name), trained.get_parameter(name))
    assert not torch.equal(loaded.get_parameter(names[0]), backbone.get_parameter(names[0]))
