"""Some rows of a data set, each of which keeps its number in the whole."""

from collections.abc import Sequence

from torch.utils.data import Dataset

from roadwork_dist.datasets.dataset import RoadworkDataset, Row


class RowsOf(Dataset[Row]):
    """Some rows of a data set; each keeps its ``index`` in the whole one.

    Args:
        dataset: the whole one.
        rows: numbers of its rows.
    """

    pure = True

    def __init__(self, dataset: RoadworkDataset, rows: Sequence[int]) -> None:
        self.dataset, self.rows = dataset, rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation draws are used."""
        self.dataset.set_epoch(epoch)

    def sample_id(self, row: int) -> str:
        """Id of a row."""
        return self.dataset.manifest[self.rows[row]].id

    @property
    def in_memory(self) -> bool:
        """Whether the whole data set is."""
        return self.dataset.in_memory

    def __getitems__(self, indices: list[int]) -> Sequence[Row]:
        return self.dataset.__getitems__([self.rows[index] for index in indices])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Row:
        return self.dataset[self.rows[row]]
