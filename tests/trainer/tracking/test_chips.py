"""Peak throughput of chips."""

import pytest

from roadwork_dist.trainer.tracking.chips import CHIPS, bf16_peak


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA B200", 2250),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("CPU", None),
    ],
)
def test_peaks_are_of_whole_listed_chips(name: str, tera: float | None) -> None:
    assert bf16_peak(name) == (None if tera is None else pytest.approx(tera * 1e12))


def test_every_peak_has_a_source() -> None:
    assert all(chip.source for chip in CHIPS)
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
