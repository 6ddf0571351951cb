"""The lines of the documentation for clusters without SLURM, on two processes."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.paths import ROOT
from support.slurm import free_ports


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_the_documented_line_starts_two_processes(launcher: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    if not shutil.which(launcher, path=environment["PATH"]):
        pytest.skip(f"no {launcher}: apt-get install openmpi-bin")
    page = (ROOT / "docs/how-to/slurm.md").read_text()
    line = re.search(rf"```bash\n({launcher} .*?)```", page, re.DOTALL)
    assert line
    changes = {
        "--nnodes 2 --nproc_per_node 8": "--nnodes 1 --nproc_per_node 2",
        "-np 16 --map-by ppr:8:node": "-np 2 --oversubscribe",
        "HEAD": "127.0.0.1",
        "29500": str(free_ports(1)[0]),
        "launch/pretrain.py": str(Path(__file__).with_name("toy_train.py")),
        "--config natix_8gpu": f"--output_dir {tmp_path / 'run'} --epochs 1",
    }
    command = line[1]
    for was, now in changes.items():
        command = command.replace(was, now)
    result = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, check=False, timeout=180
    )
    assert result.returncode == 0, result.stderr
    # Node of SLURM, rank, local rank, world size.
    assert sorted(re.findall(r"place (.*)", result.stdout)) == ["- 0 0 2", "- 1 1 2"]
    assert (tmp_path / "run/metrics.jsonl").stat().st_size
