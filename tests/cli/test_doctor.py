"""What ``doctor`` says of optional packages is what the package does with them."""

import pytest
import torch

from roadwork_dist.cli import doctor
from roadwork_dist.detector.backbone import attention

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DISTRIBUTIONS = {"flash_attn": ["flash-attn", "flash-attn-4"], "flash_attn_interface": ["flash-attn-3"]}
VERSIONS = {"flash-attn": "2.8.3", "flash-attn-3": "3.0.0", "flash-attn-4": "4.0.0"}
EVERY = ("flash_attn", "flash_attn.cute", "flash_attn_interface")


def found(
    monkeypatch: pytest.MonkeyPatch,
    installed: tuple[str, ...],
    device: torch.device,
    capability: tuple[int, int] = (9, 0),
) -> doctor.Finding:
    monkeypatch.setattr(attention, "find_spec", lambda module: object() if module in installed else None)
    monkeypatch.setattr(doctor, "packages_distributions", lambda: DISTRIBUTIONS)
    monkeypatch.setattr(doctor, "version", lambda name: VERSIONS[name])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    return doctor.flash_attention(device)


def test_every_version_of_flash_attention_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = found(monkeypatch, EVERY, GPU)
    assert finding.present
    assert finding.detail == (
        "flash_attention_4, flash_attention_3, flash_attention_2 "
        "(flash-attn 2.8.3, flash-attn-4 4.0.0, flash-attn-3 3.0.0)"
    )
    only = found(monkeypatch, ("flash_attn_interface",), CPU)
    assert only == doctor.Finding("flash attention", True, "flash_attention_3 (flash-attn-3 3.0.0)")


def test_flash_attention_without_kernels_for_the_gpu_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    old = found(monkeypatch, EVERY, GPU, (7, 5))
    assert not old.present
    assert "flash_attention_2, without kernels for this GPU; torch's own" in old.detail
    newer = found(monkeypatch, EVERY, GPU, (10, 0))
    assert newer.present
    assert newer.detail.startswith("flash_attention_4, flash_attention_2 (")  # version 3 is Hopper's alone


@pytest.mark.parametrize("device", [CPU, GPU])
def test_no_flash_attention(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    finding = found(monkeypatch, (), device)
    assert not finding.present
    assert finding.detail == "not installed; torch's own fused kernels (sdpa) are used instead"
    assert "pip install flash-attn" in finding.advice


def test_deepspeed_is_said_to_be_for_zero() -> None:
    line = next(finding for finding in doctor.packages() if finding.name == "DeepSpeed")
    assert "ZeRO 1, 2, 3" in line.detail
    assert "without" not in line.detail
    assert line.advice == "pip install 'roadwork-dist[deepspeed]'"
