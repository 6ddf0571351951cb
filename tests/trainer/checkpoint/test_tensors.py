"""Tensors that several ranks write together, and that other numbers of ranks read."""

import errno
import os
import pickle
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from roadwork_dist.common.errors import CheckpointError
from roadwork_dist.trainer.checkpoint.checkpoint_store import CheckpointStore
from roadwork_dist.trainer.checkpoint.tensors import StoredTensors, write_tensors
from roadwork_dist.trainer.engine.accelerator import build_accelerator
from roadwork_dist.trainer.engine.collectives import host_group, rank, world_size


def whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a.weight": (7, 3), "b.weight": (4, 4), "c.bias": (2,), "d.step": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def shards(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As FSDP2 has them: of ``c.bias`` the third of three ranks holds nothing."""
    mesh = init_device_mesh("cpu", (world_size(),))
    return {
        name: distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.ndim else tensor
        for name, tensor in tensors.items()
    }


def save(folder: Path, form: str) -> list[str]:
    build_accelerator(device="cpu")
    tensors: dict[str, Tensor] = whole()
    if form == "sharded":
        tensors = shards(tensors)
    elif form == "dealt":  # each rank holds other names
        tensors = {n: t for i, (n, t) in enumerate(tensors.items()) if i % world_size() == rank()}
    return write_tensors(folder, tensors, host_group())


def load(folder: Path, form: str) -> dict[str, Tensor]:
    build_accelerator(device="cpu")
    source, empty = StoredTensors(folder), {n: torch.zeros_like(t) for n, t in whole().items()}
    into = shards(empty) if form == "sharded" else empty
    source.read(into)
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in into.items()}


@pytest.mark.parametrize("form", ["same", "sharded", "dealt"])
def test_what_ranks_write_together_others_read(form: str, tmp_path: Path) -> None:
    tmp_path = tmp_path / "checkpoint"
    tmp_path.mkdir()
    files = run(save, tmp_path, form, world_size=3)
    assert [".metadata" in own for own in files] == [True, False, False]
    assert sorted(name for own in files for name in own) == sorted(path.name for path in tmp_path.iterdir())
    source = StoredTensors(tmp_path)
    assert source.shapes == {name: tensor.shape for name, tensor in whole().items()}
    for name, tensor in whole().items():
        assert torch.equal(source.whole(name), tensor)
    for got in run(load, tmp_path, "sharded", world_size=2):
        assert all(torch.equal(got[name], tensor) for name, tensor in whole().items())


def test_no_tensor_is_written_twice_and_every_rank_writes(tmp_path: Path) -> None:
    build_accelerator(device="cpu")
    big = {f"layer.{number}": torch.ones(20_000) for number in range(8)}
    run(save_these, tmp_path, big, world_size=2)
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.distcp"))]
    assert sum(sizes) < 1.1 * 8 * 80_000
    assert min(sizes) > 0.45 * 8 * 80_000


def save_these(folder: Path, tensors: dict[str, Tensor]) -> None:
    build_accelerator(device="cpu")
    write_tensors(folder, tensors, host_group())


@pytest.mark.parametrize(
    ("into", "told"),
    [
        ({"e.weight": torch.zeros(1)}, "e.weight is missing, expected shape (1,)"),
        ({"a.weight": torch.zeros(3, 7)}, "a.weight has shape (7, 3), expected shape (3, 7)"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, into: dict[str, Tensor], told: str) -> None:
    write_tensors(tmp_path, whole())
    with pytest.raises(CheckpointError) as caught:
        StoredTensors(tmp_path).read(into)
    assert told in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x80", b"nonsense"])
def test_a_table_of_contents_that_cannot_be_read_is_one_error(tmp_path: Path, content: bytes) -> None:
    write_tensors(tmp_path, whole())
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        _ = StoredTensors(tmp_path).shapes


class Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path, call: Any) -> None:
        self.folder, self.call = folder, call

    def __reduce__(self) -> Any:
        return self.call, (str(self.folder),)


@pytest.mark.parametrize("call", [os.mkdir, Path.mkdir, subprocess.run])
def test_a_table_of_contents_can_run_no_code(tmp_path: Path, call: Any) -> None:
    write_tensors(tmp_path, whole())
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "made", call)))
    with pytest.raises(CheckpointError, match=r"is not allowed in \.metadata"):
        _ = StoredTensors(tmp_path).shapes
    assert not (tmp_path / "made").exists()


def test_dotted_names_reach_nothing(tmp_path: Path) -> None:
    write_tensors(tmp_path, whole())
    module, name = b"torch.distributed.checkpoint.filesystem", b"os.system"
    call = b"\x80\x04\x8c%c%b\x8c%c%b\x93\x8c\x04true\x85R." % (len(module), module, len(name), name)
    (tmp_path / ".metadata").write_bytes(call)
    with pytest.raises(CheckpointError, match=r"os\.system is not allowed in \.metadata"):
        _ = StoredTensors(tmp_path).shapes


def save_while_one_rank_is_full(folder: Path, full: int) -> str:
    """The system refuses that rank's larger files, as a full disk does."""
    build_accelerator(device="cpu")
    group, store = host_group(), CheckpointStore(folder)
    tensors: dict[str, Any] = {f"layer.{number}": torch.ones(5_000) for number in range(4)}

    def write(folder: Path) -> list[str]:
        return write_tensors(folder, tensors, group)

    store.save(10, write, group=group)
    if rank() == full:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, hard))
    with pytest.raises(CheckpointError) as caught:
        store.save(20, write, group=group)
    return str(caught.value)


@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_full_on_one_rank_is_the_same_error_on_all(tmp_path: Path, full: int) -> None:
    messages = run(save_while_one_rank_is_full, tmp_path, full, world_size=2)
    assert messages[0] == messages[1]
    assert f"rank {full}" in messages[0]
    assert "File too large" in messages[0]
    assert "the last good one is step-00000010" in messages[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
    assert CheckpointStore(tmp_path).newest() == tmp_path / "step-00000010"


def fail_on_one_rank(folder: Path, error: Exception) -> str:
    build_accelerator(device="cpu")

    def write(folder: Path) -> list[str]:
        if rank() == 1:
            raise error
        return []

    with pytest.raises((CheckpointError, RuntimeError, ZeroDivisionError)) as caught:
        CheckpointStore(folder).save(1, write, group=host_group())
    return repr(caught.value)


def test_any_error_of_one_rank_ends_the_save_on_all(tmp_path: Path) -> None:
    first, second = run(
        fail_on_one_rank, tmp_path, OSError(errno.EROFS, "Read-only file system"), world_size=2
    )
    assert first == second
    assert "rank 1" in first
    assert "Read-only file system" in first
    first, second = run(fail_on_one_rank, tmp_path, ZeroDivisionError("oops"), world_size=2)
    assert "ZeroDivisionError: oops" in first
    assert second == "ZeroDivisionError('oops')"
