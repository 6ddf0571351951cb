"""Choosing crops before the backbone, and learning to."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from roadwork_dist.common.errors import CheckpointError, DataError
from roadwork_dist.config.batch import VOCABULARIES, Batch
from roadwork_dist.config.experiment import ModelConfig
from roadwork_dist.detector.detector import RoadworkHead, RoadworkModel
from roadwork_dist.detector.selector_training import (
    KeptSelector,
    Teaching,
    gate_targets,
    read_selector,
    train_selector,
    write_selector,
)
from roadwork_dist.detector.view_selection import (
    SelectiveDetector,
    ViewSelector,
    choose_views,
    region_means,
    select_views,
)

SIDE, WIDTH, VIEWS = 8, 16, 12


class CountingBackbone(nn.Module):
    """A linear map of the pixels that remembers how many views each call had; its cells are the pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3 * SIDE * SIDE, WIDTH).requires_grad_(False)
        self.calls: list[int] = []

    def forward(self, views: Tensor) -> Tensor:
        self.calls.append(len(views))
        out: Tensor = self.linear(views.flatten(1).float() / 255)
        return out

    def forward_cells(self, views: Tensor) -> tuple[Tensor, Tensor]:
        return self(views), views.permute(0, 2, 3, 1).float() / 255


def detector(**settings: object) -> RoadworkModel:
    torch.manual_seed(1)
    config = ModelConfig(width=64, heads=1, layers=1, **settings)  # type: ignore[arg-type]
    model = RoadworkModel(RoadworkHead(WIDTH, config, mask_head=False), CountingBackbone()).eval()
    if model.head.view_fusion is not None:  # gates start alike
        nn.init.normal_(model.head.view_fusion.gate.weight)
    return model


def batch_of(*counts: int) -> Batch:
    """Photos with so many views each; noise stands at padding."""
    generator = torch.Generator().manual_seed(len(counts))
    rows, width = len(counts), max(counts)
    batch: Batch = {
        "views": torch.randint(0, 256, (rows, width, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator),
        "view_mask": torch.arange(width) < torch.tensor(counts)[:, None],
        "boxes": torch.rand(rows, VIEWS, 4, generator=generator) / 2,
        "gps": torch.zeros(rows, 2),
        "gps_known": torch.zeros(rows, dtype=torch.bool),
        "text": torch.zeros(rows, 384),
        "text_known": torch.zeros(rows, dtype=torch.bool),
    }
    for name, words in VOCABULARIES.items():
        batch[name] = torch.full((rows,), len(words))  # type: ignore[literal-required]
    return batch


def preferring(*crops: int) -> nn.Module:
    """A scorer that gives every photo these crops, best first (crop c is view c + 1)."""
    scores = torch.zeros(VIEWS - 1)
    scores[list(crops)] = torch.arange(len(crops), 0, -1).float()

    class Fixed(nn.Module):
        def forward(self, cells: Tensor, boxes: Tensor) -> Tensor:
            return scores.expand(len(cells), -1)[:, : boxes.shape[1]]

    return Fixed()


def test_only_the_chosen_views_go_through_the_backbone() -> None:
    model = detector(prune_keep=1.0)
    counting = model.backbone
    assert isinstance(counting, CountingBackbone)
    batch = batch_of(12, 1, 12, 3)
    with torch.no_grad():
        output = SelectiveDetector(model, preferring(4, 0, 9, 7), 4)(batch)
    # four global views at once; then 4 + 0 + 4 + 2 crops of all photos at once
    assert counting.calls == [4, 10]
    looked = [row.nonzero().flatten().tolist() for row in output.view_gates]
    assert looked == [[0, 1, 5, 8, 10], [0], [0, 1, 5, 8, 10], [0, 1, 2]]


def test_it_is_the_detector_on_photos_that_have_these_views_only() -> None:
    model = detector(prune_keep=1.0)
    batch = batch_of(12, 12)
    alone: Batch = {
        **batch,
        "views": batch["views"][:, [0, 3, 6]],
        "view_mask": torch.ones(2, 3, dtype=torch.bool),
    }
    with torch.no_grad():
        output, expected = SelectiveDetector(model, preferring(2, 5), 2)(batch), model(alone)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.view_gates[:, [0, 3, 6]], expected.view_gates)


def test_all_crops_and_photos_without_crops_change_nothing() -> None:
    model = detector()
    batch = batch_of(12, 1, 12)
    with torch.no_grad():
        expected = model(batch)
        for crops in (11, 40):
            output = SelectiveDetector(model, preferring(3), crops)(batch)
            torch.testing.assert_close(output.logits, expected.logits)
            assert torch.equal(output.kept, expected.kept)
        small = batch_of(1, 1)
        output, expected = SelectiveDetector(model, preferring(3), 4)(small), model(small)
    assert torch.equal(output.logits, expected.logits)
    counting = model.backbone
    assert isinstance(counting, CountingBackbone)
    assert counting.calls[-2:] == [2, 2]  # the global views once each time; no empty call


def test_stored_features_and_the_same_scores_give_what_views_give() -> None:
    model = detector()
    batch = batch_of(12, 1, 12)
    selector = ViewSelector(3, VIEWS - 1).eval()
    with torch.no_grad():
        of_views = SelectiveDetector(model, selector, 4)(batch)
        _, cells = CountingBackbone().forward_cells(batch["views"][:, 0])
        scores = selector(cells, batch["boxes"][:, 1:])
        stored: Batch = {**batch, "features": model.features(batch["views"], batch["view_mask"])}
        of_features = model(select_views(stored, scores, 4))
    torch.testing.assert_close(of_features.logits, of_views.logits)
    assert torch.equal(of_features.kept, of_views.kept)


def test_regions_against_a_loop_over_a_finer_grid() -> None:
    """A cell is cut into 20 x 20 points; the mean over points inside a box is the mean of its region."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(2, 4, 4, 3, generator=generator, dtype=torch.float64)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.1, 0.25, 0.3, 0.5], [0.75, 0.6, 0.25, 0.4]])
    found = region_means(cells, boxes.expand(2, -1, -1))
    points = (torch.arange(80) + 0.5) / 80
    for number, (left, top, width, height) in enumerate(boxes.tolist()):
        across = (points > left) & (points < left + width)
        down = (points > top) & (points < top + height)
        fine = cells.repeat_interleave(20, dim=1).repeat_interleave(20, dim=2)
        expected = fine[:, down][:, :, across].mean(dim=(1, 2)).float()
        torch.testing.assert_close(found[:, number], expected, atol=1e-5, rtol=1e-4)
    assert not region_means(cells, torch.zeros(2, 1, 4)).any()  # no area


@pytest.mark.parametrize(("crops", "kept"), [(4, 5), (7, 8), (9, 8)])
def test_pruning_counts_by_the_views_of_the_photo(crops: int, kept: int) -> None:
    """8 of 12 views are kept of all; of 5 that were looked at, none is thrown away again."""
    with torch.no_grad():
        output = SelectiveDetector(detector(prune_keep=0.67), preferring(*range(11)), crops)(batch_of(12))
    assert int(output.view_mask.sum()) == kept


def test_a_batch_without_photos_is_told() -> None:
    with pytest.raises(DataError, match="there is no views and no boxes"):
        SelectiveDetector(detector(), preferring(0), 2)({"view_mask": torch.ones(1, 2, dtype=torch.bool)})
    model = detector()
    model.backbone = None
    with pytest.raises(DataError, match="there is no backbone"):
        SelectiveDetector(model, preferring(0), 2)(batch_of(3))


def test_the_choice_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, VIEWS - 1, generator=generator).round()  # many ties
    mask = torch.rand(40, VIEWS, generator=generator) < 0.7
    mask[:, 0] = True
    for crops in (1, 4, 11):
        chosen = choose_views(scores, mask, crops)
        for row in range(40):
            there = [v for v in range(1, VIEWS) if mask[row, v]]
            best = sorted(there, key=lambda v: (-float(scores[row, v - 1]), v))[:crops]
            assert chosen[row].nonzero().flatten().tolist() == [0, *sorted(best)]


def lesson(rows: int = 200) -> Teaching:
    """Photos whose crop with the gate is bright in the global view."""
    generator = torch.Generator().manual_seed(2)
    matters = torch.randint(0, 5, (rows,), generator=generator)
    regions = torch.randn(rows, 5, WIDTH, generator=generator)
    regions[torch.arange(rows), matters, 3] += 6
    gates = torch.full((rows, 5), 0.2)
    gates[torch.arange(rows), matters] = 0.9
    return Teaching(regions, gates, torch.arange(rows) % 5 == 0)


def test_a_selector_learns_which_crop_the_global_view_points_at() -> None:
    teaching = lesson()
    selector, figures = train_selector(teaching, seed=0)
    assert (figures.photos, figures.held_out) == (160, 40)
    assert figures.divergence < 0.25 * figures.divergence_of_order
    best = selector.of_regions(teaching.regions[teaching.held_out]).argmax(dim=1)
    assert (best == teaching.gates[teaching.held_out].argmax(dim=1)).float().mean() > 0.9
    learned, order, possible = figures.captured[1]
    assert order < learned <= possible + 1e-6
    again, _ = train_selector(teaching, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(selector.parameters(), again.parameters(), strict=True))


def test_without_anything_to_see_it_falls_back_to_the_mean_order() -> None:
    noise = torch.Generator().manual_seed(3)
    gates = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3]).expand(60, -1)
    teaching = Teaching(torch.randn(60, 5, WIDTH, generator=noise), gates, torch.arange(60) % 5 == 0)
    selector, figures = train_selector(teaching, seed=0)
    assert figures.divergence <= figures.divergence_of_order + 1e-6
    scores = selector.of_regions(teaching.regions)
    assert scores.argsort(dim=1, descending=True).tolist() == [[3, 1, 4, 2, 0]] * 60


def test_targets_of_gates_by_hand() -> None:
    """Log gates -4, -3, -2 have deviation 1 in the photo that is learned from; the other's are doubled."""
    logs = torch.tensor([[0.0, 1.0, 2.0], [0.0, 2.0, 4.0]]) - 4
    learn = torch.tensor([True, False])
    targets = gate_targets(logs.exp(), learn)
    torch.testing.assert_close(targets, logs.softmax(dim=1))
    # Gates that differ a hundred times less say the same: only the order and the proportions count.
    torch.testing.assert_close(gate_targets((logs / 100).exp(), learn), targets)
    pruned = gate_targets(torch.tensor([[0.5, 0.0, 0.5]]), torch.tensor([True]))
    assert pruned[0, 1] < 0.2 < pruned[0, 0] == pruned[0, 2]


def test_nothing_to_learn_from_is_told() -> None:
    with pytest.raises(DataError, match="gates do not differ"):
        gate_targets(torch.full((4, 3), 0.5), torch.ones(4, dtype=torch.bool))
    with pytest.raises(DataError, match="too few"):
        train_selector(Teaching(torch.zeros(2, 3, 4), torch.rand(2, 3), torch.tensor([True, False])), seed=0)


def test_a_selector_is_kept_beside_its_model_and_refuses_another(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    identity = {"backbone": "abc", "views": {"size": 64}}
    detector().save_pretrained(folder)
    with pytest.raises(CheckpointError, match=rf"does not exist.*`roadwork-dist select-views {tmp_path}`"):
        read_selector(folder, identity)
    selector = train_selector(lesson(), seed=0)[0]
    write_selector(folder, KeptSelector(selector, {2: 0.25, 4: 0.5}), identity)
    loaded = read_selector(folder, identity)
    regions = torch.randn(3, 5, WIDTH)
    assert torch.equal(loaded.selector.of_regions(regions), selector.of_regions(regions))
    assert loaded.thresholds == {2: 0.25, 4: 0.5}
    with pytest.raises(CheckpointError, match=r"another model \(backbone is 'abc', expected 'xyz'\)"):
        read_selector(folder, {**identity, "backbone": "xyz"})
    whole = (folder / "selector.safetensors").read_bytes()
    (folder / "selector.safetensors").write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_selector(folder, identity)
    (folder / "selector.safetensors").write_bytes(whole)
    (folder / "model.safetensors").write_bytes(b"trained on")
    with pytest.raises(CheckpointError, match="another model \\(weights is"):
        read_selector(folder, identity)
