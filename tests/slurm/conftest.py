"""The cluster that the tests of the launch scripts run on."""

from collections.abc import Iterator

import pytest
from support.slurm import ClusterError, SlurmCluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Two virtual nodes with two fake GPUs each; skips where SLURM cannot be started."""
    slurm = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
    except ClusterError as error:
        slurm.stop()
        pytest.skip(f"no SLURM: {error}")
    yield slurm
    slurm.stop()
