"""Every shipped configuration of a launcher is read by its real parser, and runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from support.paths import ROOT
from support.ranks import free_port
from support.toy import lines

CONFIGS = sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml"))
ENGINES = {"single_gpu": "replicated", "cpu": "replicated", "ddp_8gpu": "replicated"}


def engine_of(name: str) -> str:
    return ENGINES.get(name) or re.sub(r"\d?_.*|\d$", "", name) + ("2" if name.startswith("fsdp") else "")


def test_the_shipped_names() -> None:
    names = "cpu single_gpu ddp_8gpu fsdp2_8gpu fsdp2_multinode zero1 zero2 zero3 zero3_offload"
    assert sorted([*names.split(), "zero3_multinode"]) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_it(name: str) -> None:
    config = load_config_from_file(str(ROOT / f"accelerate_configs/{name}.yaml"))
    processes = {"cpu": 2, "single_gpu": 1}.get(name, 16 if name.endswith("multinode") else 8)
    assert config.num_processes == processes
    assert config.num_machines == (2 if name.endswith("multinode") else 1)
    if name.startswith("zero"):
        file = ROOT / config.deepspeed_config["deepspeed_config_file"]
        assert json.loads(file.read_text())["zero_optimization"]["stage"] == int(name[4])


def launch(name: str, run_dir: Path, *, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Start the toy run with accelerate's launcher: two processes, or the one that the file says."""
    processes = "1" if name == "single_gpu" else "2"
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / f"accelerate_configs/{name}.yaml"), "--num_machines", "1"]
    command += ["--num_processes", processes, "--machine_rank", "0", "--main_process_port", str(free_port())]
    command += ["--num_cpu_threads_per_process", "1", str(ROOT / "tests/support/launched.py"), str(run_dir)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("two")
    result = launch("cpu", folder)
    assert result.returncode == 0, result.stderr
    return lines(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_runs(name: str, tmp_path: Path, one_process: list[dict[str, object]]) -> None:
    result = launch(name, tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"rank 0: {engine_of(name)}" in result.stdout
    if name != "single_gpu":  # half the rows a step, so other losses
        assert f"rank 1: {engine_of(name)}" in result.stdout
        for ours, theirs in zip(lines(tmp_path), one_process, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
