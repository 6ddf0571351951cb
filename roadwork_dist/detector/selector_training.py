"""Teaching a view selector what the full model's gates say, and keeping it beside the model.

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
"""Beside the weights that it was distilled from."""

FORMAT = 1

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, PATIENCE = 200, 32, 1e-3, 0.1, 30
"""Recipe of the distillation. Epochs without a better held-out figure end it."""

LEAST_GATE = 0.01
"""What a pruned crop's gate counts as, whose logarithm would be infinite."""

LEAST_STD = 1e-3
"""Features that hardly change are not blown up when they are standardised."""


@dataclass(frozen=True)
class Teaching:
    """What the full model says about photos.

    Attributes:
        regions: what the global view shows inside the crops' frames [N, K, C].
        gates: of the crops [N, K], from 0 (pruned) to 1.
        held_out: [N] bool: photos that decide when to stop, and nothing else.
    """

    regions: Tensor
    gates: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class SelectorFigures:
    """How well a selector knows gates that it has not seen (of the held-out photos)."""

    photos: int
    """Photos it learned from."""
    held_out: int
    divergence: float
    """Mean KL(targets ‖ scores) in nats; see :func:`gate_targets`."""
    divergence_of_order: float
    """The same of one fixed order, the mean targets of the photos it learned from."""
    captured: dict[int, tuple[float, ...]]
    """By number of crops: the share of the targets that the selector's choice holds, that of the fixed order,
    and that of the best possible choice. A random choice holds crops / K."""


def gate_targets(gates: Tensor, learn: Tensor) -> Tensor:
    """Gates [N, K] as shares of attention that sum to 1 over a photo's crops.

    The softmax of log gates, centred in each photo and divided by their mean spread over the photos that are
    learned from: only differences between a photo's crops matter to a choice, and in a trained fusion they
    may be a few percent. Gates of pruned crops (0) count as :data:`LEAST_GATE`.

    Raises:
        DataError: all gates of a photo are alike, in every photo.
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
    ICML 2007, with log gates as relevance). The weights with the least held-out loss are kept; they start as
    the fixed order that suits most photos, so the result is not worse than that on the held-out photos.

    Raises:
        DataError: there is nothing to learn from.
    """
    learn, check = ~teaching.held_out, teaching.held_out
    if int(learn.sum()) < 2 or int(check.sum()) < 1:
        raise DataError(f"{len(learn)} photos with crops are too few to distil a selector: train on more")
    regions, shares = teaching.regions.float(), gate_targets(teaching.gates, learn)
    with isolated_rng(seed):
        selector = _started(regions[learn], shares[learn])
        _train(selector, regions, shares, learn, check, torch_generator_for(seed, "distil"))
    return selector.eval(), _figures(selector, regions, shares, learn, check)


def _started(regions: Tensor, shares: Tensor) -> ViewSelector:
    """A selector that knows the scale of regions, and the mean shares as its bias."""
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
    best, best_state, waited = _divergence(selector, regions[check], shares[check]), _state(selector), 0
    for _ in range(EPOCHS):
        selector.train()
        for picked in rows[torch.randperm(len(rows), generator=generator)].split(BATCH):  # type: ignore[no-untyped-call]
            loss = _kl(selector.of_regions(regions[picked]), shares[picked])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        now = _divergence(selector, regions[check], shares[check])
        waited += 1
        if now < best:
            best, best_state, waited = now, _state(selector), 0
        if waited >= PATIENCE:
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
    """What a selector of a saved model belongs to: the backbone's weights, and how views are cut."""
    views = config.extra.get("views", {})
    return {
        "backbone": config.backbone.get("sha256"),
        "views": {name: views.get(name) for name in ("size", "policy", "grid", "scale")},
    }


@dataclass(frozen=True)
class KeptSelector:
    """A selector as it is kept beside a model."""

    selector: ViewSelector
    thresholds: Mapping[int, float]
    """Decision threshold by number of crops, chosen on validation photos with so many crops."""


def write_selector(folder: Path, kept: KeptSelector, identity: Mapping[str, Any]) -> Path:
    """Write ``selector.safetensors`` beside the weights that a selector was distilled from.

    Args:
        folder: holds ``model.safetensors``.
        kept: the selector and its thresholds.
        identity: what it belongs to (backbone, views); JSON. The hash of the weights is added.

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
    """The selector beside a model's weights, in eval mode on the CPU, with its thresholds.

    Raises:
        CheckpointError: it is absent or damaged, or was distilled from another model, backbone or views.
    """
    path = folder / SELECTOR_FILE
    again = f"`roadwork-dist select-views {folder.parent if folder.name == 'best' else folder}` writes it"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, and views.select needs it: {again}")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["selector"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        expected = {"format": FORMAT, **identity, "weights": _weights_hash(folder)}
        for name, value in expected.items():
            if about.get(name) != value:
                raise CheckpointError(
                    f"{path} was distilled for another model ({name} is {about.get(name)!r}, expected "
                    f"{value!r}): {again} anew"
                )
        selector = ViewSelector(len(tensors["mean"]), about["crops"])
        selector.load_state_dict(tensors)
        thresholds = {int(crops): float(value) for crops, value in about["thresholds"].items()}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): {again} anew") from error
    return KeptSelector(selector.eval(), thresholds)


def _weights_hash(folder: Path) -> str:
    try:
        with (folder / WEIGHTS_FILE).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} cannot be read ({error}): train first") from error
