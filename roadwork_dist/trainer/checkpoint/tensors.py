"""Reads and writes a checkpoint's tensors through ``torch.distributed.checkpoint``.

Every rank writes a file of its own: its shards, and its share of the tensors that several ranks hold.
They can be read back into any other layout.
"""

import io
import pathlib
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from roadwork_dist.common.errors import CheckpointError
from roadwork_dist.trainer.engine.collectives import rank, world_size

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

METADATA = ".metadata"
_FAULTS = (
    *(OSError, EOFError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError),
    *(AssertionError, IndexError, pickle.UnpicklingError),
)


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> list[str]:
    """Write tensors by name. A collective: all ranks call it together.

    Args:
        folder: shared by all ranks.
        tensors: plain tensors that are equal on every rank that holds them, and DTensors. Ranks may hold
            different names.
        group: for the ranks' communication.

    Returns:
        Names of the files that this rank has written.

    Raises:
        OSError, RuntimeError: this rank could not write.
        CheckpointError: another rank could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.state_dict_saver import save

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _without_warning_of_one_process():
            save(
                dict(tensors),
                storage_writer=_writer(folder),
                planner=planner,
                process_group=group,
                no_dist=world_size() == 1,
            )
    except CheckpointException as error:  # not a subclass of Exception; the same on all ranks
        failures: dict[int, Any] = error.failures
        number, (first, _) = min(failures.items(), key=lambda item: item[0])
        if rank() in failures:
            raise failures[rank()][0] from error
        raise CheckpointError(f"rank {number}: {getattr(first, 'strerror', None) or first}") from error
    own = [path.name for path in folder.glob(f"__{rank()}_*.distcp")]
    return [*own, METADATA] if rank() == 0 else own


def _writer(folder: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

    class Writer(FileSystemWriter):
        """Reports a full disk as such."""

        def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
            try:
                return super().write_data(plan, planner)
            except RuntimeError as error:
                # torch.save replaces the system's error of a refused write with its own. Undone here,
                # because an error loses its context on the way to the other ranks.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise

    return Writer(folder)


class StoredTensors:
    """The tensors of a checkpoint: a :class:`~roadwork_dist.trainer.engine.base.TensorSource`.

    Args:
        folder: of the checkpoint, verified.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _metadata(self) -> "Metadata":
        try:
            with (self.folder / METADATA).open("rb") as file:
                contents = _MetadataUnpickler(file).load()
            _ = {name: entry.size for name, entry in contents.state_dict_metadata.items()}
            return contents  # type: ignore[no-any-return]
        except _FAULTS as error:
            raise CheckpointError(f"{self.folder} cannot be read ({error!r})") from error

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every tensor, by name."""
        return {name: entry.size for name, entry in self._metadata.state_dict_metadata.items()}  # type: ignore[union-attr]

    @cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every tensor, by name."""
        return {
            name: entry.properties.dtype  # type: ignore[union-attr]
            for name, entry in self._metadata.state_dict_metadata.items()
        }

    def read(self, into: dict[str, Tensor]) -> None:
        """Fill tensors in place; each rank reads what it needs, without waiting for others.

        Raises:
            CheckpointError: one is missing, has another shape, or cannot be read.
        """
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.state_dict_loader import load

        for name, tensor in into.items():
            if self.shapes.get(name) != tensor.shape:
                got = f"has shape {tuple(self.shapes[name])}" if name in self.shapes else "is missing"
                raise CheckpointError(
                    f"{self.folder} does not fit: {name} {got}, expected shape {tuple(tensor.shape)}"
                )
        if not into:
            return
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            with torch.no_grad(), _without_warning_of_one_process():
                load(dict(into), storage_reader=self._reader(), planner=planner, no_dist=True)
        except _FAULTS as error:
            raise CheckpointError(f"{self.folder} cannot be read ({error!r})") from error

    def whole(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        self.read({name: tensor})
        return tensor

    def _reader(self) -> Any:
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.metadata import Metadata

        known = self._metadata

        class Reader(FileSystemReader):
            """Uses the metadata that has already been read."""

            def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
                return known

        return Reader(self.folder)


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles ``.metadata``, accepting only what torch writes, so that it cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        """A class of the metadata, a dtype or a path.

        Raises:
            pickle.UnpicklingError: anything else.
        """
        # Other modules are not even imported. A dotted name would reach what a module has imported.
        if module in _MODULES and "." not in name:
            found = super().find_class(module, name)
            is_own = isinstance(found, type) and found.__module__ == module
            if is_own and module in _METADATA_MODULES:
                return found
            if is_own and issubclass(found, pathlib.PurePath):
                return found
            if module == "torch" and (isinstance(found, torch.dtype) or found is torch.Size):
                return found
            if (module, name) == ("torch.serialization", "_get_layout"):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in {METADATA}")


_METADATA_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_MODULES = (*_METADATA_MODULES, "torch", "torch.serialization", "pathlib", "pathlib._local")


@contextmanager
def _without_warning_of_one_process() -> Iterator[None]:
    """Suppress torch's warning that it runs without other ranks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def write_torch(path: Path, value: Any) -> None:
    """Write what ``torch.load(weights_only=True)`` can read, such as states of random generators."""
    # Through memory: torch.save to a file reports a full disk as another error.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())
