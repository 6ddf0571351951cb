"""Distilling a view selector from the full model's gates, and saving and loading it with the model.

N photos · K crops · C channels of the backbone's last map
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.common.errors import CheckpointError, DataError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.common.random import isolated_rng, torch_generator_for
from roadwork_dist.detector.pretrained import WEIGHTS_FILE, PretrainedConfig
from roadwork_dist.detector.view_selection import ViewSelector

SELECTOR_FILE = "selector.safetensors"
"""In the same folder as the weights that it was distilled from."""

FORMAT = 1

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, PATIENCE = 200, 32, 1e-3, 0.1, 30
"""Hyperparameters of the distillation. It stops after ``PATIENCE`` epochs without a lower held-out loss."""

LEAST_GATE = 0.01
"""Lower bound of a gate. A pruned crop has gate 0, whose logarithm would be infinite."""

LEAST_STD = 1e-3
"""Lower bound of the standard deviation, so that nearly constant features are not amplified."""


@dataclass(frozen=True)
class Teaching:
    """Training data of a selector: the full model's features and gates of photos.

    Attributes:
        regions: mean cells of the global view inside the crops' frames [N, K, C].
        gates: of the crops [N, K], from 0 (pruned) to 1.
        held_out: [N] bool: photos that are used only for early stopping.
    """

    regions: Tensor
    gates: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class SelectorFigures:
    """How well a selector predicts the gates of the held-out photos."""

    photos: int
    """Training photos."""
    held_out: int
    divergence: float
    """Mean KL(targets ‖ scores) in nats; see :func:`gate_targets`."""
    divergence_of_order: float
    """The same for one fixed order of crops: the mean targets of the training photos."""
    captured: dict[int, tuple[float, ...]]
    """Per number of crops, the share of the targets covered by the selector's choice, by the fixed order,
    and by the best possible choice. A random choice covers crops / K."""


def gate_targets(gates: Tensor, learn: Tensor) -> Tensor:
    """Gates [N, K] as shares of attention that sum to 1 over a photo's crops.

    The softmax of log gates, centred per photo and divided by their mean standard deviation over the training
    photos (``learn`` [N] bool). Only differences between a photo's crops matter to a choice, and in a trained
    fusion they may be a few percent. Gates of pruned crops (0) are raised to :data:`LEAST_GATE`.

    Raises:
        DataError: in every photo, all gates are equal.
    """
    logs = gates.float().clamp(min=LEAST_GATE).log()
    logs = logs - logs.mean(dim=1, keepdim=True)
    spread = logs[learn].std(dim=1).mean()
    if not bool(spread > 0):
        raise DataError("the model's gates do not differ between crops: there is nothing to distil from them")
    return (logs / spread).softmax(dim=1)


def train_selector(teaching: Teaching, *, seed: int) -> tuple[ViewSelector, SelectorFigures]:
    """Train a selector to predict from the global view how a photo's gates differ.

    The loss is KL(targets ‖ softmax(scores)), see :func:`gate_targets` (ListNet's top-one loss, Cao et al.,
    ICML 2007, with log gates as relevance). The weights with the lowest held-out loss are kept. Since the
    initial selector is the mean order of the training photos, the result is no worse than that order on the
    held-out photos.

    Raises:
        DataError: there are too few photos, or their gates do not differ.
    """
    learn, check = ~teaching.held_out, teaching.held_out
    if int(learn.sum()) < 2 or int(check.sum()) < 1:
        raise DataError(f"{len(learn)} photos with crops are too few to distil a selector: train on more")
    regions, shares = teaching.regions.float(), gate_targets(teaching.gates, learn)
    with isolated_rng(seed):
        selector = _initial_selector(regions[learn], shares[learn])
        _train(selector, regions, shares, learn, check, torch_generator_for(seed, "distil"))
    return selector.eval(), _figures(selector, regions, shares, learn, check)


def _initial_selector(regions: Tensor, shares: Tensor) -> ViewSelector:
    """A selector with the mean and deviation of regions, zero output weights, and mean shares as its bias."""
    selector = ViewSelector(regions.shape[2], shares.shape[1])
    with torch.no_grad():
        selector.mean.copy_(regions.mean(dim=(0, 1)))
        selector.std.copy_(regions.std(dim=(0, 1)).clamp(min=LEAST_STD))
        selector.score.weight.zero_()
        selector.bias.copy_(shares.mean(dim=0).clamp(min=1e-6).log())
    return selector


def _train(
    selector: ViewSelector,
    regions: Tensor,
    shares: Tensor,
    learn: Tensor,
    check: Tensor,
    generator: torch.Generator,
) -> None:
    optimizer = torch.optim.AdamW(selector.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rows = learn.nonzero().squeeze(1)
    best, best_state = _divergence(selector, regions[check], shares[check]), _state(selector)
    stale_epochs = 0
    for _ in range(EPOCHS):
        selector.train()
        for picked in rows[torch.randperm(len(rows), generator=generator)].split(BATCH):  # type: ignore[no-untyped-call]
            loss = _kl(selector.of_regions(regions[picked]), shares[picked])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        divergence = _divergence(selector, regions[check], shares[check])
        stale_epochs += 1
        if divergence < best:
            best, best_state, stale_epochs = divergence, _state(selector), 0
        if stale_epochs >= PATIENCE:
            break
    selector.load_state_dict(best_state)


def _kl(scores: Tensor, shares: Tensor) -> Tensor:
    return F.kl_div(scores.log_softmax(dim=1), shares, reduction="batchmean")


def _divergence(selector: ViewSelector, regions: Tensor, shares: Tensor) -> float:
    selector.eval()
    with torch.no_grad():
        return float(_kl(selector.of_regions(regions), shares))


def _state(selector: ViewSelector) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in selector.state_dict().items()}


def _figures(
    selector: ViewSelector, regions: Tensor, shares: Tensor, learn: Tensor, check: Tensor
) -> SelectorFigures:
    mean = shares[learn].mean(dim=0)
    truth = shares[check]
    fixed = mean.clamp(min=1e-6).log().expand_as(truth)
    with torch.no_grad():
        scores = selector.of_regions(regions[check])
    captured = {
        count: tuple(_captured(by, truth, count) for by in (scores, fixed, truth))
        for count in range(1, truth.shape[1])
    }
    return SelectorFigures(
        photos=int(learn.sum()),
        held_out=int(check.sum()),
        divergence=float(_kl(scores, truth)),
        divergence_of_order=float(_kl(fixed, truth)),
        captured=captured,
    )


def _captured(scores: Tensor, shares: Tensor, count: int) -> float:
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return float(shares.gather(1, best).sum(dim=1).mean())


def identity_of(config: PretrainedConfig) -> dict[str, Any]:
    """What a saved model's selector depends on: the backbone's weights, and how views are cut."""
    views = config.extra.get("views", {})
    return {
        "backbone": config.backbone.get("sha256"),
        "views": {name: views.get(name) for name in ("size", "policy", "grid", "scale")},
    }


@dataclass(frozen=True)
class KeptSelector:
    """A selector as it is saved with a model."""

    selector: ViewSelector
    thresholds: Mapping[int, float]
    """Decision threshold per number of crops, chosen on validation photos with that number."""


def write_selector(folder: Path, kept: KeptSelector, identity: Mapping[str, Any]) -> Path:
    """Write ``selector.safetensors`` next to the weights that a selector was distilled from.

    Args:
        folder: holds ``model.safetensors``.
        kept: the selector and its thresholds.
        identity: as of :func:`identity_of`; JSON. The hash of the weights is added.

    Raises:
        CheckpointError: the folder has no weights.
        OSError: the file cannot be written.
    """
    about = {"format": FORMAT, "crops": kept.selector.crops, **identity, "weights": _weights_hash(folder)}
    about["thresholds"] = {str(crops): value for crops, value in kept.thresholds.items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in kept.selector.state_dict().items()}
    path = folder / SELECTOR_FILE
    write_atomic(path, save(tensors, metadata={"selector": json.dumps(about, sort_keys=True)}))
    return path


def read_selector(folder: Path, identity: Mapping[str, Any]) -> KeptSelector:
    """Read the selector next to a model's weights, in eval mode on the CPU, with its thresholds.

    Raises:
        CheckpointError: it is missing or damaged, or was distilled from another model, backbone or views.
    """
    path = folder / SELECTOR_FILE
    remedy = f"run `roadwork-dist select-views {folder.parent if folder.name == 'best' else folder}`"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, but views.select needs it: {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["selector"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        expected = {"format": FORMAT, **identity, "weights": _weights_hash(folder)}
        for name, value in expected.items():
            if about.get(name) != value:
                raise CheckpointError(
                    f"{path} was distilled for another model ({name} is {about.get(name)!r}, expected "
                    f"{value!r}): {remedy} again"
                )
        selector = ViewSelector(len(tensors["mean"]), about["crops"])
        selector.load_state_dict(tensors)
        thresholds = {int(crops): float(value) for crops, value in about["thresholds"].items()}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): {remedy} again") from error
    return KeptSelector(selector.eval(), thresholds)


def _weights_hash(folder: Path) -> str:
    try:
        with (folder / WEIGHTS_FILE).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} cannot be read ({error}): train first") from error
