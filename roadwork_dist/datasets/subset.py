"""A subset of a data set whose rows keep their original index."""

from collections.abc import Sequence

from roadwork_dist.datasets.dataset import RoadworkDataset, Row
from roadwork_dist.trainer.feed.dataset import WrappedDataset


class RowsOf(WrappedDataset[Row]):
    """Some rows of a data set; each keeps its ``index`` in the whole data set.

    Args:
        dataset: the whole data set.
        rows: numbers of the rows to use.
    """

    def __init__(self, dataset: RoadworkDataset, rows: Sequence[int]) -> None:
        super().__init__(dataset)
        self.rows = rows

    def inner_row(self, row: int) -> int:
        """Row number in the whole data set."""
        return self.rows[row]

    def __len__(self) -> int:
        return len(self.rows)
