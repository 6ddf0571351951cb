"""Quality and cost of k selected crops instead of all, for a trained run with a selector.

Quality: MCC and AUROC with 95 % bootstrap intervals for k crops in addition to the global view, chosen by the
distilled selector, at random (mean of several draws), centre first, and by the model's own gates (which
need all views, so they are an upper bound, not a method). Every threshold is the best one on the run's
validation photos for that method and that k, so figures on the validation photos themselves are optimistic.

Cost: views through the backbone, and CPU time of a photo from views in memory to probability and from its
file to probability, in turns, in one process with one thread.

    roadwork-dist select-views RUN
    python benchmarks/data_select.py RUN [--data SOURCE] [--svg FOLDER]
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measuring import alternate, heading, median_and_spread, ratios
from torch import Tensor

from roadwork_dist.config.batch import TEXT_WIDTH, VOCABULARIES
from roadwork_dist.config.experiment import ExperimentConfig
from roadwork_dist.config.io import load_experiment
from roadwork_dist.datasets.boxed import view_boxes
from roadwork_dist.datasets.dataset import collate
from roadwork_dist.detector.backbone import Backbone
from roadwork_dist.detector.view_selection import ViewSelector, select_views
from roadwork_dist.evaluation.charts import Line, line_chart
from roadwork_dist.inference.predictor import ALL_CROPS, Predictor
from roadwork_dist.metrics.bootstrap import bootstrap_intervals
from roadwork_dist.metrics.classification import best_threshold, classification_metrics
from roadwork_dist.photos.images import FileImage, photo_size
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.photos.views import photo_boxes
from roadwork_dist.recipes.data import DatasetBuilder, load_manifests
from roadwork_dist.recipes.select_views import seen_batches
from roadwork_dist.sources import load_manifest
from roadwork_dist.trainer.engine.accelerator import build_accelerator

CROPS = (2, 4, 6, 8, 11)
"""The k of the curve, after 0, the global view alone."""

FIGURES = ("mcc", "auroc")

Chooser = Callable[["Split"], Tensor]
"""Photos → scores of their crops [N, K]."""

Answer = dict[str, tuple[float, float, float]]
"""A figure → value, low and high end of its interval."""


@dataclass(frozen=True)
class Split:
    """Labelled photos with the features of all their views, as one batch."""

    name: str
    batch: dict[str, Tensor]
    regions: Tensor  # [N, K, C] mean of the global view's feature map inside each crop's frame
    gates: Tensor  # [N, K] of the crops, from the full model
    labels: Tensor  # [N]


def load_splits(run: Path, predictor: Predictor, source: str | None) -> list[Split]:
    """Validation and target photos of a run, and photos of another source; features from the run's store."""
    config = replace(load_experiment(run / "config.yaml"), workers=0)
    manifests = load_manifests(config)
    photos: dict[str, Manifest] = {"val": manifests.val}
    if manifests.target is not None:
        photos["target"] = manifests.target.labelled()
    if source is not None:
        data = replace(config.data, image_root=None)
        photos["unseen"] = load_manifest(source, data, name="unseen").labelled()
    return [_split(name, manifest, config, predictor) for name, manifest in photos.items()]


def _split(name: str, manifest: Manifest, config: ExperimentConfig, predictor: Predictor) -> Split:
    backbone = predictor.model.backbone
    assert isinstance(backbone, Backbone)
    builder = DatasetBuilder(config, backbone, build_accelerator(device=config.device), masks=False)
    dataset = builder.build(manifest, augment=False)
    seen = list(seen_batches(predictor, dataset, replace(config, batch_size=len(dataset))))
    batch, regions = seen[0].batch, seen[0].regions
    with torch.no_grad():
        gates = predictor.forward(batch).view_gates[:, 1:].float()
    return Split(name, dict(batch), regions, gates, batch["label"])


def probabilities(predictor: Predictor, split: Split, scores: Tensor, crops: int) -> Tensor:
    """[N] probability of roadwork with ``crops`` crops."""
    with torch.no_grad():
        output = predictor.forward(select_views(split.batch, scores, crops))
    return output.logits.double().softmax(dim=1)[:, 1]


def figures(truth: Tensor, found: Tensor, threshold: float, resamples: int) -> Answer:
    """MCC and AUROC with their intervals."""
    values = classification_metrics(truth.numpy(), found.numpy(), threshold)
    ends = bootstrap_intervals(truth.numpy(), found.numpy(), threshold, n=resamples)
    return {name: (values[name] or 0.0, *(ends[name] or (0.0, 0.0))) for name in FIGURES}


def centre_first(size: tuple[int, int], predictor: Predictor) -> Tensor:
    """[C] scores: the nearer a crop's centre to that of a photo of this size, the higher."""
    boxes = photo_boxes(predictor.views.geometry, *size)
    offsets = [
        (box.left + box.width / 2 - size[0] / 2) ** 2 + (box.top + box.height / 2 - size[1] / 2) ** 2
        for box in boxes[1:]
    ]
    return -torch.tensor(offsets)


def choosers(predictor: Predictor, selector: ViewSelector, draws: int) -> dict[str, list[Chooser]]:
    """By name: functions that score the crops of a split; several for random ones."""
    centre = centre_first((4032, 3024), predictor)

    def at_random(seed: int) -> Chooser:
        return lambda split: torch.rand(split.gates.shape, generator=torch.Generator().manual_seed(seed))

    def by_selector(split: Split) -> Tensor:
        with torch.no_grad():
            return selector.of_regions(split.regions)

    return {
        "selector": [by_selector],
        "random": [at_random(seed) for seed in range(draws)],
        "centre first": [lambda split: centre.expand_as(split.gates)],
        "gates (need all views)": [lambda split: split.gates],
    }


Curve = dict[str, dict[str, dict[int, Answer]]]
"""Split → chooser → k → figures."""


def curve(
    predictor: Predictor, selector: ViewSelector, splits: list[Split], draws: int, resamples: int
) -> Curve:
    """Every figure of every method; means over draws if there are several."""
    val = splits[0]
    result: Curve = {split.name: {} for split in splits}
    for name, ways in choosers(predictor, selector, draws).items():
        for crops in (0, *CROPS):
            answers: dict[str, list[Answer]] = {split.name: [] for split in splits}
            for way in ways if crops not in (0, max(CROPS)) else ways[:1]:  # nothing is chosen at the ends
                on_val = probabilities(predictor, val, way(val), crops)
                threshold = best_threshold(val.labels.numpy(), on_val.numpy())
                for split in splits:
                    found = probabilities(predictor, split, way(split), crops)
                    answers[split.name].append(figures(split.labels, found, threshold, resamples))
            for split_name, several in answers.items():
                result[split_name].setdefault(name, {})[crops] = _mean(several)
    return result


def _mean(answers: list[Answer]) -> Answer:
    triples = {name: [answer[name] for answer in answers] for name in FIGURES}
    return {
        name: (mean(t[0] for t in values), mean(t[1] for t in values), mean(t[2] for t in values))
        for name, values in triples.items()
    }


def cost_table(predictors: dict[int, Predictor], photos: list[Path], turns: int) -> str:
    """Views and milliseconds of a photo by k, as Markdown."""
    reference = predictors[max(predictors)]
    views = collate(
        [{"views": reference.views.plain(photo.read_bytes(), name=str(photo))} for photo in photos]
    )
    size = photo_size(photos[0].read_bytes(), name=str(photos[0]))
    boxes = view_boxes(reference.views, size[1], size[0]).expand(len(photos), -1, -1)
    batch = {**_no_metadata(len(photos)), **views, "boxes": boxes}

    def from_views(crops: int) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return predictors[crops].forward({**batch})

        return run

    def from_files(crops: int) -> Callable[[], object]:
        return lambda: list(predictors[crops].predict(photos, batch_size=len(photos)))

    names = [str(crops) for crops in predictors]
    in_memory = alternate({name: from_views(int(name)) for name in names}, turns, time.process_time)
    whole = alternate({name: from_files(int(name)) for name in names}, turns, time.process_time)
    most = str(max(predictors))
    lines = [
        "| crops | views | ms of CPU a photo, views in memory | IQR | ratio to all "
        "| from the file | IQR | ratio to all |",
        "|--:" * 8 + "|",
    ]
    for crops in predictors:
        cells = [str(crops), str(1 + crops)]
        for times in (in_memory, whole):
            per_photo = [1000 * t / len(photos) for t in times[str(crops)]]
            share = median(ratios(times, str(crops), most))
            cells += [median_and_spread(per_photo, digits=1), f"{share:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _no_metadata(rows: int) -> dict[str, Tensor]:
    unknown = torch.zeros(rows, dtype=torch.bool)
    batch = {"gps": torch.zeros(rows, 2), "gps_known": unknown, "text_known": unknown}
    batch["text"] = torch.zeros(rows, TEXT_WIDTH)
    return batch | {name: torch.full((rows,), len(words)) for name, words in VOCABULARIES.items()}


def quality_table(curve_of_split: dict[str, dict[int, Answer]], figure: str) -> str:
    """A figure by choice and k, as Markdown."""
    names = list(curve_of_split)
    lines = [f"| crops | {' | '.join(names)} |", "|--:" * (1 + len(names)) + "|"]
    for crops in (0, *CROPS):
        cells = []
        for name in names:
            value, low, high = curve_of_split[name][crops][figure]
            cells.append(f"{value:.3f} ({low:.3f} … {high:.3f})")
        lines.append(f"| {crops} | {' | '.join(cells)} |")
    return "\n".join(lines)


STYLE = """
 svg { font: 11px system-ui, sans-serif; --line: #dfe3e8; --muted: #5b6570; background: #fff; }
 .grid { stroke: var(--line); } .axis { stroke: var(--muted); } text { fill: var(--muted); }
 .line { fill: none; stroke: var(--colour); stroke-width: 1.8; } .dashed { stroke-dasharray: 5 4; }
 .dot { fill: var(--colour); } .whisker { stroke: var(--colour); stroke-width: 1; stroke-opacity: 0.45; }
 .c1 { --colour: #1b6aa8; } .c2 { --colour: #c8500f; } .c3 { --colour: #0b7d61; } .c4 { --colour: #8e4585; }
"""
"""The report has its own styles for charts; a standalone file needs them included."""


def draw(curve_of_split: dict[str, dict[int, Answer]], figure: str, title: str) -> str:
    """The curve as a standalone SVG file."""
    lines = [
        Line(
            name,
            [(float(k), answer[figure][0]) for k, answer in by_crops.items()],
            colour=f"c{number}",
            dots=True,
            dashed=name.startswith("gates"),
        )
        for number, (name, by_crops) in enumerate(curve_of_split.items(), start=1)
    ]
    chart = line_chart(title, lines, x_label="crops beside the global view", y_label=figure.upper())
    legend = "".join(
        f'<g class="{line.colour}"><path class="line {"dashed" if line.dashed else ""}" '
        f'd="M{290},{150 + 16 * n}h22"/><text x="318" y="{154 + 16 * n}">{line.name}</text></g>'
        for n, line in enumerate(lines)
    )
    body = str(chart.svg).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return body.replace(">", f"><style>{STYLE}</style>", 1).replace("</svg>", f"{legend}</svg>") + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder with a distilled selector")
    parser.add_argument("--data", help="further labelled photos that the run has never seen")
    parser.add_argument("--draws", type=int, default=10, help="random choices (%(default)s)")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (%(default)s)")
    parser.add_argument("--photos", type=int, default=8, help="photos that are timed (%(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="turns of the clock (%(default)s)")
    parser.add_argument("--cost_only", action="store_true", help="no curve")
    parser.add_argument("--svg", type=Path, help="folder for pictures of the last photos' curves")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    print(heading("transformers", "timm"))
    config = load_experiment(options.run / "config.yaml")
    crops = [k for k in (2, 4, 6, 8) if k < config.views.grid**2 + 2]
    predictors = {k: Predictor.from_pretrained(options.run, device="cpu", select=k) for k in crops}
    predictors[11] = Predictor.from_pretrained(options.run, device="cpu", select=ALL_CROPS)
    selection = predictors[crops[0]].selection
    assert selection is not None
    selector = selection.scorer
    assert isinstance(selector, ViewSelector)
    print(cost_table(predictors, _files(config, options.photos), options.turns))
    if options.cost_only:
        return 0
    splits = load_splits(options.run, predictors[11], options.data)
    found = curve(predictors[11], selector, splits, options.draws, options.resamples)
    for split in splits:
        for figure in FIGURES:
            count = f"{len(split.labels)} photos, {int(split.labels.sum())} with roadwork"
            print(f"\n{figure.upper()}, {split.name}: {count}\n\n{quality_table(found[split.name], figure)}")
    if options.svg is not None:
        for figure in FIGURES:
            title = f"{figure.upper()} of {len(splits[-1].labels)} photos by crops looked at"
            drawing = draw(found[splits[-1].name], figure, title)
            (options.svg / f"view-selection-{figure}.svg").write_text(drawing)
    return 0


def _files(config: ExperimentConfig, count: int) -> list[Path]:
    """Validation photos that have crops, as files."""
    images = [sample.image for sample in load_manifests(config).val]
    return [image.path for image in images if isinstance(image, FileImage)][:count]


if __name__ == "__main__":
    sys.exit(main())
