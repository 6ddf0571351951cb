"""Predicts the probability of roadwork in photos with a saved model.

B batch · V views · K classes
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from roadwork_dist.common.errors import CheckpointError, ConfigError, DataError
from roadwork_dist.config.batch import Batch, ModelOutput
from roadwork_dist.config.experiment import BackboneConfig, ViewsConfig
from roadwork_dist.datasets.boxed import BoxedRows
from roadwork_dist.datasets.dataset import RoadworkDataset, Row, collate
from roadwork_dist.detector.backbone import Backbone, load_backbone
from roadwork_dist.detector.detector import RoadworkModel
from roadwork_dist.detector.pretrained import CONFIG_FILE, PretrainedConfig, read_config
from roadwork_dist.detector.selector_training import identity_of, read_selector
from roadwork_dist.detector.view_selection import SelectiveDetector
from roadwork_dist.features.text import TextEmbeddings, TextEncoder, embed_descriptions
from roadwork_dist.photos.images import MAX_PIXELS, FileImage
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.photos.views import geometry_for
from roadwork_dist.trainer.answers import answer_rows
from roadwork_dist.trainer.engine.precision import in_precision
from roadwork_dist.trainer.feed.dataset import WrappedDataset
from roadwork_dist.trainer.feed.loader import load_batches, pure

logger = logging.getLogger(__name__)

DECISION_FILE = "decision.json"
"""File next to the weights with the decision threshold and the split it was chosen on."""

ALL_CROPS = 1_000
"""Value of ``select`` for all crops: more than any photo has."""

Photo = str | Path | Sample


@dataclass(frozen=True, slots=True)
class Prediction:
    """Prediction of the model for one photo."""

    id: str
    """Id of the sample, or the path if only a path was given."""
    probability: float
    """Probability of roadwork."""
    prediction: int
    """1 if ``probability`` is above the threshold, else 0."""
    logit_0: float
    logit_1: float
    view_gates: list[float]
    """Weight in [0, 1] of each view; 0 = pruned or not selected."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A photo that cannot be read."""

    id: str
    reason: str
    """One line that names the file."""


OnError = Callable[[Unreadable], None]


class Predictor:
    """A model with everything needed to predict photos.

    Args:
        model: on its device; with its backbone if photos are to be read.
        views: how a photo becomes views, without augmentation.
        threshold: photos with a higher probability are classified as roadwork.
        text_encoder: name of the text encoder of descriptions; loaded when first needed.
        precision: arithmetic of the head, ``fp32`` or ``bf16``, the same as in training.
        selection: the model restricted to selected crops of a photo; None = use all views.
    """

    def __init__(
        self,
        model: RoadworkModel,
        views: PhotoViews,
        *,
        threshold: float = 0.5,
        text_encoder: str | None = None,
        precision: str = "fp32",
        selection: SelectiveDetector | None = None,
    ) -> None:
        self.model, self.views, self.threshold = model.eval(), views, threshold
        self.selection = selection
        self.text_encoder, self.precision = text_encoder, precision
        self._encode_text: TextEncoder | None = None

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.head.parameters()).device

    @property
    def forward(self) -> Callable[[Batch], ModelOutput]:
        """The model's forward pass, in the precision that it was trained and validated with."""
        return in_precision(self.selection or self.model, self.precision, self.device)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "auto",
        max_pixels: int = MAX_PIXELS,
        select: int | None = None,
    ) -> Self:
        """Load a model saved by a run, with its backbone and its threshold (0.5 if none was chosen).

        Args:
            folder: a run folder, or its ``best/``.
            device: ``auto`` = the first GPU if there is one, else the CPU; or a torch device name.
            max_pixels: photos with more pixels are refused.
            select: number of crops that go through the backbone besides the global view; the number of crops
                or more = all; None = ``views.select`` of the run.

        Raises:
            CheckpointError: the folder is incomplete or damaged, the available backbone has other weights
                than the one the model was trained with, or crops are to be selected but no selector was
                distilled.
            BackboneError: the backbone cannot be loaded.
            ConfigError: there is no such device.
        """
        folder = weights_folder(folder)
        config = read_config(folder)
        where = _device(device)
        backbone = _backbone(config, folder, where)
        model = RoadworkModel.from_pretrained(folder, backbone=backbone).to(where)
        try:
            settings = ViewsConfig(**config.extra["views"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / CONFIG_FILE} does not say how photos are cut into views ({error}): expected "
                "extra.views, as a run writes it; save the model again"
            ) from error
        views = plain_views(settings, backbone, max_pixels)
        select = crops_to_select(settings, select)
        selection, threshold = None, read_threshold(folder)
        if select is not None:
            kept = read_selector(folder, identity_of(config))
            selection = SelectiveDetector(model, kept.selector, select).to(where).eval()
            threshold = kept.thresholds.get(select, threshold)
        return cls(
            model,
            views,
            threshold=threshold,
            text_encoder=config.extra.get("text_encoder") if config.model.metadata else None,
            precision=config.extra.get("precision", "fp32"),
            selection=selection,
        )

    def predict(
        self,
        photos: Iterable[Photo] | Manifest,
        *,
        batch_size: int = 8,
        workers: int = 0,
        on_error: OnError | None = None,
    ) -> Iterator[Prediction]:
        """Predict photos, in the given order; results are yielded batch by batch.

        Args:
            photos: paths, or samples with their metadata (place, weather, description, …).
            batch_size: photos per batch.
            workers: number of processes that decode; 0 = decode in this process.
            on_error: called for every photo that cannot be read; None = log a warning. The other photos
                are predicted anyway.

        Raises:
            ConfigError: ``batch_size`` or ``workers`` is out of range.
            BackboneError: photos have descriptions and their encoder cannot be loaded.
        """
        if isinstance(photos, str | Path):  # else each letter would be treated as a path
            photos = [photos]
        manifest = photos if isinstance(photos, Manifest) else Manifest("photos", tuple(map(_sample, photos)))
        if batch_size < 1 or workers < 0:
            raise ConfigError(
                f"batch_size is {batch_size} and workers is {workers}, expected >= 1 and >= 0: correct them"
            )
        dataset = RoadworkDataset(manifest, views=self.views, text=self._text(manifest))
        return self._predict(dataset, batch_size, workers, on_error or _warn)

    def _predict(
        self, dataset: RoadworkDataset, batch_size: int, workers: int, on_error: OnError
    ) -> Iterator[Prediction]:
        rows = dataset if self.selection is None else BoxedRows(dataset, self.views)
        forward, pinned = self.forward, self.device.type == "cuda"
        answers = answer_rows(
            lambda read: None if read[0] is None else forward(read[0]),
            _Tolerant(rows),
            batch_size=batch_size,
            device=self.device,
            load=partial(load_batches, workers=workers, collate=_collate_readable, pin_memory=pinned),
        )
        for answer in answers:
            batch, unreadable = answer.batch
            for photo in unreadable:
                on_error(photo)
            if batch is not None:
                yield from self._predictions(batch, answer.output)

    def _predictions(self, batch: Batch, output: ModelOutput) -> list[Prediction]:
        logits = output.logits.cpu()  # [B, K]
        probabilities = logits.double().softmax(dim=1)[:, 1].tolist()
        gates = output.view_gates.float().cpu()  # [B, V]
        return [
            Prediction(
                id=batch["id"][row],
                probability=probability,
                prediction=int(probability > self.threshold),
                logit_0=float(logits[row, 0]),
                logit_1=float(logits[row, 1]),
                view_gates=gates[row][batch["view_mask"][row]].tolist(),
            )
            for row, probability in enumerate(probabilities)
        ]

    def _text(self, manifest: Manifest) -> TextEmbeddings | None:
        descriptions = [sample.description for sample in manifest]
        if self.text_encoder is None or not any(descriptions):
            return None
        if self._encode_text is None:
            from roadwork_dist.detector.text import load_text_encoder

            self._encode_text = load_text_encoder(self.text_encoder)
        return embed_descriptions(descriptions, self._encode_text)


def plain_views(config: ViewsConfig, backbone: Backbone, max_pixels: int = MAX_PIXELS) -> PhotoViews:
    """Unaugmented views for a backbone; very elongated photos are padded with its mean colour."""
    red, green, blue = (round(255 * channel) for channel in backbone.mean)
    geometry = geometry_for(config, backbone.view_size(config.size), (red, green, blue))
    return PhotoViews(geometry, None, max_pixels)


def crops_to_select(config: ViewsConfig, select: int | None = None) -> int | None:
    """Number of crops to use besides the global view; None = all.

    Args:
        config: how photos are cut into views.
        select: overrides ``views.select``; None = use that setting.
    """
    select = config.select if select is None else select
    has_fewer = select is not None and config.policy != "global" and select < config.grid**2 + 2
    return select if has_fewer else None


def weights_folder(folder: str | Path) -> Path:
    """The folder with the weights: the given one, or its ``best/`` if it is a run folder.

    Raises:
        CheckpointError: neither holds a saved model.
    """
    folder = Path(folder)
    for candidate in (folder, folder / "best"):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    what = "holds no saved model" if folder.is_dir() else "is not a folder"
    raise CheckpointError(
        f"{folder} {what}: expected a run folder (--output_dir of a training run that has validated at "
        f"least once) or its best/, with {CONFIG_FILE} and model.safetensors"
    )


def read_threshold(folder: Path) -> float:
    """The decision threshold stored next to the weights, or 0.5 if none was chosen.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / DECISION_FILE
    if not path.is_file():
        return 0.5
    try:
        return float(json.loads(path.read_bytes())["threshold"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}), expected a threshold: delete the file to use 0.5, or evaluate "
            "the run again"
        ) from error


def _backbone(config: PretrainedConfig, folder: Path, device: torch.device) -> Backbone:
    """The backbone that the model was trained with.

    Raises:
        CheckpointError: none is named, or the available one has other weights.
    """
    settings: dict[str, Any] = dict(config.backbone)
    path = folder / CONFIG_FILE
    try:
        expected = settings.pop("sha256")
        # Choose the attention kernel for this machine: the one of training may not be available here.
        backbone_config = BackboneConfig(**{**settings, "attention": "auto"})
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{path} does not identify the backbone ({error}): expected its name, settings and sha256, as a "
            "run writes them; save the model again"
        ) from error
    backbone = load_backbone(backbone_config, device=device)
    if backbone.identity != expected:
        raise CheckpointError(
            f"the backbone {backbone_config.name!r} found here has other weights (SHA-256 "
            f"{backbone.identity[:12]}…) than the one {folder} was trained with ({expected[:12]}…): "
            "install or download those weights"
        )
    return backbone


def _device(name: str | torch.device) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"device {str(name)!r} cannot be used ({reason}): expected auto, cpu, cuda or cuda:N"
        ) from error
    return device


def _sample(photo: Photo) -> Sample:
    return photo if isinstance(photo, Sample) else Sample(id=str(photo), image=FileImage(Path(photo)))


def _warn(photo: Unreadable) -> None:
    logger.warning("left out: %s", photo.reason)


class _Tolerant(WrappedDataset[Row | Unreadable]):
    """Rows of a data set; an :class:`Unreadable` replaces each row that cannot be read."""

    def __getitem__(self, index: int) -> Row | Unreadable:
        try:
            return super().__getitem__(index)
        except DataError as error:
            return Unreadable(self.sample_id(index), str(error))


@pure
def _collate_readable(rows: list[Row | Unreadable]) -> tuple[Batch | None, list[Unreadable]]:
    readable = [row for row in rows if isinstance(row, Mapping)]
    return collate(readable) if readable else None, [row for row in rows if isinstance(row, Unreadable)]
