"""What GPU tests share. Nothing here knows which device it runs on."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from roadwork_dist.config.batch import DAYTIME, MASK_CLASSES, MASK_SIDE, SCENE, TEXT_WIDTH, WEATHER, Batch

GPU = torch.device("cuda")
CPU = torch.device("cpu")

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that torch can use (torch.cuda.is_available())"
)


@contextmanager
def deterministic() -> Iterator[None]:
    """Only algorithms that give the same bits every time; others raise."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)


def random_views(count: int, side: int, seed: int = 0) -> Tensor:
    """Random views [N, 3, S, S] uint8 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def random_batch(rows: int, width: int, views: int = 12, seed: int = 0) -> Batch:
    """Random features and metadata on the CPU; the last row has three views only, some fields are null."""
    generator = torch.Generator().manual_seed(seed)
    known = torch.arange(rows) % 2 == 0
    view_mask = torch.ones(rows, views, dtype=torch.bool)
    view_mask[-1, 3:] = False

    def words(count: int) -> Tensor:
        return torch.randint(0, count + 1, (rows,), generator=generator)

    return {
        "id": [str(row) for row in range(rows)],
        "index": torch.arange(rows),
        "features": torch.randn(rows, views, width, generator=generator),
        "view_mask": view_mask,
        "label": torch.arange(rows) % 2,
        "gps": torch.rand(rows, 2, generator=generator) * 80 * known.unsqueeze(1),
        "gps_known": known,
        "weather": words(len(WEATHER)),
        "daytime": words(len(DAYTIME)),
        "scene": words(len(SCENE)),
        "text": torch.randn(rows, TEXT_WIDTH, generator=generator) * known.unsqueeze(1),
        "text_known": known,
        "mask": torch.rand(rows, len(MASK_CLASSES), MASK_SIDE, MASK_SIDE, generator=generator),
        "mask_known": known,
    }


def assert_close_to_bf16(got: Tensor, expected: Tensor, share: float = 0.05) -> None:
    """Vectors [..., D] that differ by bf16 rounding: each points the same way, none is off by much.

    bf16 has 8 bits, so one rounding is up to 0.4 %; a network of some dozen layers adds up a few.
    """
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    assert got.shape == expected.shape
    assert got.isfinite().all()
    cosine = torch.nn.functional.cosine_similarity(got, expected, dim=-1)
    assert cosine.min() > 1 - share**2, f"cosine {cosine.min():.6f}"
    error = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < share, f"relative error {error.max():.4f}"
