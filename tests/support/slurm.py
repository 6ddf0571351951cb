"""A throw-away SLURM cluster on this machine: munged, slurmctld and one slurmd a virtual node.

Real daemons on loopback, fake GPUs (a second ``/dev/null`` each), no systemd, no accounting. Several
clusters may run side by side: ports are free ones, and job numbers start at a random place, for the
launch scripts derive the training's port from the job's number.
"""

import contextlib
import os
import pwd
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo")
PACKAGES = "slurmctld slurmd slurm-client munge"
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_POLL_S = 0.1

_CONFIG = """\
ClusterName=roadwork-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until the credential of its last start has expired; 5 s is the least.
AuthInfo=socket={base}/munge.socket,cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
FirstJobId={first_job}
ReturnToService=2
EnforcePartLimits=ALL
KillWait=5
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{listen}
"""


class ClusterError(RuntimeError):
    """The cluster cannot be started here; says why."""


class SlurmCluster:
    """Starts and ends the daemons, submits jobs, waits for them.

    Args:
        base: an empty folder for settings, state and logs.
        nodes: virtual nodes, ``node1`` and on.
        gpus: fake GPUs of a node.
    """

    def __init__(self, base: Path, nodes: int = 2, gpus: int = 2) -> None:
        self.base, self.nodes, self.gpus = base, nodes, gpus
        self._daemons: list[tuple[str, subprocess.Popen[bytes]]] = []
        # A job of SLURM or torchrun that pytest itself runs in must not shine through.
        foreign = ("SLURM_", "PMI_", "OMPI_", "TORCHELASTIC_", "ACCELERATE_", "ROADWORK_DIST_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        self.environment |= {"SLURM_CONF": str(base / "slurm.conf"), "PATH": _PATH}

    # Starting and ending ------------------------------------------------------------------------

    def start(self) -> None:
        """Start every daemon and wait until all nodes are idle.

        Raises:
            ClusterError: a program is not installed, or a daemon does not come up.
        """
        missing = [name for name in PROGRAMS if not shutil.which(name, path=_PATH)]
        if missing:
            raise ClusterError(f"{', '.join(missing)} not installed: apt-get install {PACKAGES}")
        self._write_settings()
        socket_file = self.base / "munge.socket"
        munge_files = ("key", "socket", "pid", "log", "seed")
        options = [
            f"--{n}-file={self.base / f'munge.{n}'}" if n != "socket" else f"--socket={socket_file}"
            for n in munge_files
        ]
        # --force: pytest's folders are closed to other users, which munged takes for a mistake.
        self._daemon("munged", "--foreground", "--force", *options)
        self._wait_for("munged", lambda: self._succeeds("munge", "-n", "-S", str(socket_file)))
        self._daemon("slurmctld", "-D")
        self._wait_for("slurmctld", lambda: "is UP" in self._output("scontrol", "ping"))
        for number in range(1, self.nodes + 1):
            self._daemon("slurmd", "-D", "-N", f"node{number}")
        self._wait_for(
            "every node", lambda: self._output("sinfo", "-h", "-N", "-p", "main", "-o", "%t") == self._idle
        )

    @property
    def _idle(self) -> str:
        return "\n".join(["idle"] * self.nodes)

    def stop(self) -> None:
        """Cancel what runs, then end the daemons. Nothing of the cluster is left running."""
        if any(name == "slurmctld" and daemon.poll() is None for name, daemon in self._daemons):
            # A job whose batch script takes the signal may requeue itself: so until nothing is left.
            with contextlib.suppress(TimeoutError):
                self._until(30, self._cancel_everything)
        for _, daemon in reversed(self._daemons):
            daemon.terminate()
        for _, daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def _cancel_everything(self) -> bool:
        jobs = self._output("squeue", "-h", "-t", "all", "-o", "%i %T").splitlines()
        alive = [j.split()[0] for j in jobs if j.split()[1] in ("PENDING", "RUNNING", "COMPLETING")]
        for job in alive:
            self._succeeds("scancel", "--full", "--signal=KILL", job)
            self._succeeds("scancel", job)
        return not alive

    def _write_settings(self) -> None:
        (self.base / "state").mkdir(mode=0o700)
        with (self.base / "munge.key").open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(random.randbytes(128))
        host = socket.gethostname().partition(".")[0]
        port, *node_ports = free_ports(self.nodes + 1)
        text = _CONFIG.format(
            host=host,
            port=port,
            base=self.base,
            user=pwd.getpwuid(os.getuid()).pw_name,
            first_job=random.randrange(1000, 60000),
            listen=_listen_on_loopback(host),
        )
        processors = "CPUs=8 Sockets=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=8000"
        for number, node_port in enumerate(node_ports, start=1):
            name = f"node{number}"
            text += f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={node_port} {processors}"
            text += f" Gres=gpu:{self.gpus}\n"
        text += "PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=10 PreemptMode=OFF\n"
        text += "PartitionName=low Nodes=ALL State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60\n"
        (self.base / "slurm.conf").write_text(text)
        (self.base / "cgroup.conf").write_text("CgroupAutomount=no\n")
        devices = self.base / "dev"
        devices.mkdir()
        for number in range(self.gpus):
            _fake_gpu(devices / f"nvidia{number}")
        lines = [f"Name=gpu File={devices / f'nvidia{number}'}" for number in range(self.gpus)]
        (self.base / "gres.conf").write_text("\n".join(["AutoDetect=off", *lines, ""]))

    def _daemon(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=_PATH)
        assert program
        # The daemon goes when pytest goes, however that ends.
        command = ["setpriv", "--pdeathsig", "TERM", program, *arguments]
        with (self.base / f"{name}{len(self._daemons)}.out").open("wb") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=self.environment
            )
        self._daemons.append((name, process))

    def _wait_for(self, what: str, is_there: Callable[[], bool]) -> None:
        def is_up() -> bool:
            for name, daemon in self._daemons:
                if daemon.poll() is not None:
                    raise ClusterError(f"{name} ended at once: {self.daemon_logs()[-500:]}")
            return is_there()

        try:
            self._until(20, is_up)
        except TimeoutError as error:
            raise ClusterError(f"{what} did not come up: {self.daemon_logs()[-500:]}") from error

    def daemon_logs(self) -> str:
        """What the daemons said, for a failed test."""
        files = sorted([*self.base.glob("*.out"), *self.base.glob("*.log")])
        return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')}" for f in files if f.stat().st_size)

    # Jobs ---------------------------------------------------------------------------------------

    def submit(self, *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
        """``sbatch --parsable``: the number of the job, or of the array.

        Raises:
            AssertionError: sbatch refuses; says why.
        """
        result = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            cwd=cwd,
            env=self.environment | dict(environment or {}),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def signal(self, job: str, name: str, *options: str) -> None:
        """``scancel --signal``: to the steps of a job; with ``-b`` to its batch script."""
        assert self._succeeds("scancel", *options, f"--signal={name}", job)

    def cancel(self, job: str) -> None:
        """``scancel``."""
        assert self._succeeds("scancel", job)

    def job(self, job: str) -> dict[str, str]:
        """Fields of ``scontrol show job``; of the first task, where it is an array."""
        record = self._output("scontrol", "show", "--oneliner", "job", job).splitlines()[0]
        return dict(word.split("=", 1) for word in record.split() if "=" in word)

    def wait(self, job: str, timeout: float = 120) -> list[str]:
        """Wait until a job and every task of it is over; its states, by task.

        Raises:
            TimeoutError: it still runs.
        """
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}

        def states() -> list[str]:
            return self._output("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").splitlines()

        self._until(timeout, lambda: bool(states()) and set(states()) <= over)
        return states()

    def wait_until(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Poll a condition.

        Raises:
            TimeoutError: it does not come true.
        """
        self._until(timeout, condition)

    @staticmethod
    def _until(seconds: float, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:.0f} s")
            time.sleep(_POLL_S)

    def _call(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )

    def _succeeds(self, *command: str) -> bool:
        return self._call(command).returncode == 0

    def _output(self, *command: str) -> str:
        return self._call(command).stdout.strip()


def free_ports(count: int) -> list[int]:
    """TCP ports that nothing listens on, below those that the kernel gives to connections."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(10000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    return ports


def _listen_on_loopback(host: str) -> str:
    """Keep the daemons off the network, where that leaves them reachable.

    They then listen on the address that the host's own name has, so that has to be the one they are
    called at. Elsewhere they listen everywhere; munge's fresh key keeps others out.
    """
    try:
        loopback = socket.gethostbyname(host) == "127.0.0.1"
    except OSError:
        loopback = False
    return "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if loopback else ""


def _fake_gpu(path: Path) -> None:
    try:
        os.mknod(path, 0o20666, os.makedev(1, 3))
    except PermissionError:  # not root: slurmd complains of a plain file, and takes it
        path.touch()
