"""The launch scripts on a real SLURM: two virtual nodes, processes that really train."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT
from support.slurm import SlurmCluster
from support.tiny_run import tiny_arguments, tiny_set
from support.toy import lines

from roadwork_dist.config.io import parse_experiment

pytestmark = pytest.mark.slurm

HERE = Path(__file__).parent
TWO_BY_TWO = ("--nodes=2", "--gpus-per-node=2")
ONE_PROCESS = ("--nodes=1", "--gpus-per-node=1")


class Site:
    """A folder that jobs are submitted from, as a user does: with launch/ in it."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "launch").symlink_to(ROOT / "launch")
        (folder / ".venv").symlink_to(ROOT / ".venv")
        self.environment: dict[str, str] = {"ROADWORK_DIST_ENTRY": str(HERE / "toy_train.py")}

    def submit(self, *words: str, script: str = "launch/pretrain.slurm", **environment: str) -> str:
        """Options of sbatch and settings of the training; returns the job."""
        options = [word for word in words if word in (*TWO_BY_TWO, *ONE_PROCESS) or word.startswith("--s:")]
        settings = [word for word in words if word not in options]
        options = [word.replace("--s:", "--") for word in options]
        given = self.environment | environment
        return self.cluster.submit(*options, script, *settings, cwd=self.folder, environment=given)

    def log(self) -> str:
        """What the batch scripts of this folder said."""
        return "".join(path.read_text() for path in self.folder.glob("*.log"))

    def said(self) -> str:
        """What the nodes said."""
        files = sorted(self.folder.glob("logs/*/start-*.log"))
        return "".join(path.read_text() for path in files)

    def finish(self, job: str) -> list[str]:
        """States of the tasks, once all are over."""
        return self.cluster.wait(job, timeout=120)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the job does."""
        self.cluster.wait_until(condition, timeout=180)


@pytest.fixture
def site(cluster: SlurmCluster, tmp_path: Path) -> Site:
    return Site(cluster, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two nodes with two processes each; the nodes' output is in ``said``."""
    site = Site(cluster, tmp_path_factory.mktemp("undisturbed"))
    job = site.submit(*TWO_BY_TWO, "--output_dir=run")
    assert site.finish(job) == ["COMPLETED"], site.log() + site.said()
    (site.folder / "said").write_text(site.said())
    return site.folder / "run"


def train_losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run) if line["kind"] == "train"]


def test_two_nodes_train_as_one_does(undisturbed: Path, site: Site) -> None:
    job = site.submit(
        "--s:gpus-per-node=0", "--output_dir=run", ROADWORK_DIST_PROCESSES_PER_NODE="4", OMP_NUM_THREADS="1"
    )
    assert site.finish(job) == ["COMPLETED"], site.log() + site.said()
    assert train_losses(site.folder / "run") == pytest.approx(train_losses(undisturbed), rel=1e-6)
    places = re.findall(r"\] place (.*)", (undisturbed.parent / "said").read_text())
    # Node, rank, local rank, world size: the first node holds the first ranks.
    assert sorted(places) == ["node1 0 0 4", "node1 1 1 4", "node2 2 0 4", "node2 3 1 4"]
    assert "4 processes on 1 node(s) (node1), 0 GPUs a node" in site.log()


def test_a_requeued_run_ends_like_an_undisturbed_one(undisturbed: Path, site: Site) -> None:
    job = site.submit(*TWO_BY_TWO, "--output_dir=run", "--step_seconds=0.2")
    metrics = site.folder / "run/metrics.jsonl"
    site.until(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) >= 3)
    site.cluster.signal(job, "USR1", "--batch")
    assert site.finish(job) == ["COMPLETED"], site.log() + site.said()
    assert site.cluster.job(job)["Restarts"] == "1"
    stopped = re.search(r"asked to stop by SIGUSR1: state saved at step (\d+) of 20", site.log())
    assert stopped, site.log()
    assert int(stopped[1]) % 10, "stopped between epochs, so this shows little"
    was, now = (
        [{k: v for k, v in line.items() if k != "kind"} for line in lines(run)]
        for run in (undisturbed, site.folder / "run")
    )
    assert [line["step"] for line in now] == [line["step"] for line in was]
    # Bits would be too much to ask of more than two ranks: DDP lays its buckets out anew behind the first
    # step of a start, and the place in a bucket decides the order in which four summands are added.
    for before, after in zip(was, now, strict=True):
        assert after == pytest.approx(before, rel=1e-5)


def test_a_failing_rank_fails_the_job(site: Site) -> None:
    job = site.submit(*TWO_BY_TWO, "--output_dir=run", "--failing_rank=3")
    site.until(lambda: "this rank fails" in site.said())
    assert site.cluster.wait(job, timeout=30) == ["FAILED"]
    log = site.log()
    assert site.cluster.job(job)["Restarts"] == "0"
    assert "failed on node2: rank : 3" in log
    assert "[rank 3] RuntimeError: this rank fails, for the test" in log


def test_an_array_trains_each_task_alone(site: Site) -> None:
    job = site.submit(*ONE_PROCESS, "--s:array=0-2", "--output_dir=run", "--epochs=1")
    assert site.finish(job) == ["COMPLETED"] * 3, site.log() + site.said()
    runs = [site.folder / f"run/task-{task}" for task in range(3)]
    assert [yaml.safe_load((run / "config.yaml").read_text())["seed"] for run in runs] == [0, 1, 2]
    assert len({tuple(train_losses(run)) for run in runs}) == 3
    ports = re.findall(r"meeting at \S+:(\d+)", site.log())
    assert len(set(ports)) == 3


def test_the_detector_trains(site: Site) -> None:
    arguments = tiny_arguments(tiny_set(site.folder / "photos"), site.folder)
    site.environment.clear()
    job = site.submit(*ONE_PROCESS, *arguments, "--optim.lr=1e-4")
    assert site.finish(job) == ["COMPLETED"], site.log() + site.said()
    assert yaml.safe_load((site.folder / "run/config.yaml").read_text())["optim"]["lr"] == 1e-4
    assert (site.folder / "run/metrics.jsonl").stat().st_size


# Signals, with a stand-in for the training -----------------------------------------------------------


@pytest.fixture
def waiting(site: Site) -> Site:
    """A site whose training waits for signals."""
    site.environment["ROADWORK_DIST_ENTRY"] = str(HERE / "stub_train.py")
    return site


def test_preemption_requeues(waiting: Site) -> None:
    job = waiting.submit(*ONE_PROCESS, "--s:partition=low")
    waiting.until(lambda: "ready" in waiting.said())
    # SLURM sends TERM to the ranks, nothing to the batch script, and waits for the grace time of 60 s.
    waiting.cluster.submit("-N2", "--exclusive", "--partition=main", "--wrap=sleep 1", cwd=waiting.folder)
    assert waiting.finish(job) == ["COMPLETED"], waiting.log()
    assert waiting.cluster.job(job)["Restarts"] == "1"
    assert "by SIGTERM: state saved" in waiting.log()


def test_one_task_of_an_array_is_requeued_and_another_cancelled(waiting: Site) -> None:
    job = waiting.submit(*ONE_PROCESS, "--s:array=0-1", "{task}")
    # The last task of an array has the array's own number: bare, it would mean all of them.
    waiting.until(lambda: waiting.said().count("ready") == 2)
    waiting.cluster.signal(f"{job}_1", "USR1")  # to the ranks only, past the batch script
    waiting.cluster.wait_until(lambda: "requeueing" in waiting.log())
    waiting.cluster.cancel(f"{job}_0")
    assert sorted(waiting.finish(job)) == ["CANCELLED", "COMPLETED"], waiting.log()
    assert waiting.cluster.job(f"{job}_0")["Restarts"] == "0"
    assert waiting.cluster.job(f"{job}_1")["Restarts"] == "1"
    assert "asked to stop by SIGUSR1" in waiting.log()


def test_a_job_that_may_not_be_requeued_ends_with_75(waiting: Site) -> None:
    job = waiting.submit(*ONE_PROCESS, "--s:no-requeue")
    waiting.until(lambda: "ready" in waiting.said())
    waiting.cluster.signal(job, "USR1", "--batch")
    assert waiting.finish(job) == ["FAILED"]
    assert waiting.cluster.job(job)["ExitCode"] == "75:0"
    assert "NOT requeued" in waiting.log()


# Mistakes, told before anything starts ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"ACCELERATE_CONFIG": "fsdp9"}, "ACCELERATE_CONFIG is 'fsdp9': there is neither such a file nor"),
        ({"ROADWORK_DIST_ENTRY": "absent.py"}, "ROADWORK_DIST_ENTRY is 'absent.py': no such file"),
        ({"ROADWORK_DIST_PROCESSES_PER_NODE": "two"}, "expected a whole number from 1"),
        ({"ROADWORK_DIST_HOME": "/nowhere"}, "no launch/lib.sh in '/nowhere'"),
    ],
)
def test_mistakes_are_told(site: Site, environment: dict[str, str], says: str) -> None:
    job = site.submit(*ONE_PROCESS, **environment)
    assert site.finish(job) == ["FAILED"]
    assert site.cluster.job(job)["ExitCode"] == "2:0"
    assert says in site.log()


# Without a cluster -------------------------------------------------------------------------------------


def in_bash(text: str, *arguments: str, **environment: str) -> list[str]:
    """Lines that a piece of bash prints which has sourced lib.sh."""
    code = f"set -euo pipefail; home={ROOT}; source {ROOT}/launch/lib.sh; {text}"
    result = subprocess.run(
        ["bash", "-c", code, "bash", *arguments], capture_output=True, text=True, check=True, env=environment
    )
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ([], ["--seed=3", "--output_dir=runs/x/task-3"]),
        (
            ["--output_dir", "a b", "--seed=7"],
            [*("--output_dir", "a b", "--seed=7", "--seed=3"), "--output_dir=a b/task-3"],
        ),
        (["--output_dir=r/{task}", "--optim.lr", "1e-{task}"], ["--output_dir=r/3", "--optim.lr", "1e-3"]),
    ],
)
def test_settings_of_a_task_of_an_array(given: list[str], settings: list[str]) -> None:
    code = 'settings_of_array_task "$@"; printf "%s\\n" "${settings[@]}"'
    assert in_bash(code, *given, SLURM_ARRAY_TASK_ID="3", SLURM_JOB_NAME="x") == settings


def test_every_member_of_the_ensemble_is_a_valid_experiment(tmp_path: Path) -> None:
    """The script itself, with a ``train`` that only prints."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/lib.sh").write_text(
        (ROOT / "launch/lib.sh").read_text() + '\ntrain() { printf "%s\\n" "$@"; }\n'
    )
    members = {}
    for number in range(7):
        environment = {"ROADWORK_DIST_HOME": str(tmp_path), "SLURM_ARRAY_TASK_ID": str(number)}
        script = [ROOT / "launch/ensemble.slurm", "--config=demo", "--output_dir=e", "--epochs=1"]
        told = subprocess.run(
            ["bash", *script], env=environment, capture_output=True, text=True, check=True
        ).stdout
        config = parse_experiment(told.splitlines())
        assert config.epochs == 1
        members[config.output_dir] = config
    assert [config.seed for config in members.values()] == [42, 123, 456, 789, 2026, 314, 314]
    assert members["e/no_pruning"].model.prune_keep == 1.0
    assert members["e/no_pruning"].augment.strength == 1.5
    assert members["e/deeper"].model.layers == 6
    assert members["e/deeper"].model.dropout == 0.2
    assert members["e/wider"].model.width == 768
    assert members["e/more_heads"].model.heads == 16
    assert members["e/convnext"].backbone.name == "convnextv2_base"
    assert members["e/strong_gps"].gps.near_weight == 10
