"""Forward pass of a vision backbone: views per second, and the share of the chip's bf16 peak.

The network has its real architecture and RANDOM weights, and the views are random: neither changes the time
of a dense network. Timed is what training does once a photo's views are on the device: uint8 to normalised
bf16, the network, one vector per view. Only the CLS token is used, but every token is computed.

Operations are counted on the meta device by torch's own counter (a multiplication and an addition are
two), for matrix products, convolutions and attention; the share is that count over the time and the
chip's dense bf16 peak.

    python benchmarks/backbone.py
    python benchmarks/backbone.py --device cpu --backbone dinov3_vits16 --size 224 --batches 1 2
"""

import argparse
import platform
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version

import torch

from roadwork_dist.common.errors import RoadworkError
from roadwork_dist.detector.backbone import Backbone, build_random
from roadwork_dist.trainer.tracking.chips import bf16_peak

VIEWS_OF_A_PHOTO = 12

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Result:
    """Result of one batch size; ``seconds`` is empty if the batch did not fit into memory."""

    batch: int
    seconds: list[float]
    peak_bytes: int = 0

    @property
    def views_per_s(self) -> float:
        """Median over the repeats."""
        return self.batch / statistics.median(self.seconds)


def operations_per_view(name: str, size: int) -> int:
    """Floating-point operations of one view [1, 3, S, S], counted without allocating the network."""
    network = build_random(name, device=torch.device("meta"), dtype=torch.bfloat16, attention="sdpa")
    return network.forward_operations(size)


def attention_of(backbone: Backbone, size: int) -> str:
    """Attention implementation, and the kernel that torch chooses for it on this device."""
    config = getattr(backbone.network, "config", None)
    name = getattr(config, "_attn_implementation", None)
    if config is None or name is None:
        return "none (no transformers network)"
    if name != "sdpa" or backbone.patch is None:
        return str(name)
    heads = config.num_attention_heads
    tokens = 1 + getattr(config, "num_register_tokens", 0) + (size // backbone.patch) ** 2
    device = next(backbone.parameters()).device
    query = torch.empty(1, heads, tokens, backbone.width // heads, dtype=backbone.dtype, device=device)
    kernel = torch.nn.attention.SDPBackend(torch._fused_sdp_choice(query, query, query))
    return f"sdpa ({kernel.name.lower()})"


def time_forward(backbone: Backbone, views: torch.Tensor) -> float:
    """Seconds of one forward pass, by CUDA events on a GPU."""
    if views.device.type != "cuda":
        started = time.perf_counter()
        backbone(views)
        return time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    backbone(views)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def measure(backbone: Backbone, batch: int, size: int, repeats: int, warmup: int) -> Result:
    """Time ``repeats`` forward passes of one batch size after ``warmup`` untimed ones."""
    device = next(backbone.parameters()).device
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        views = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
        for _ in range(warmup):
            backbone(views)
        seconds = [time_forward(backbone, views) for _ in range(repeats)]
    except torch.OutOfMemoryError:
        return Result(batch, [])
    return Result(batch, seconds, torch.cuda.max_memory_allocated(device) if is_gpu else 0)


def table(results: list[Result], operations: int, peak: float | None) -> str:
    """Markdown: one row per batch size; without a known peak the share is omitted."""
    head = ["views a batch", "ms a batch", "fastest to slowest", "views/s", "photos/s", "TFLOP/s"]
    head += ["share of bf16 peak"] if peak else []
    head += ["peak GiB"]
    lines = [f"| {' | '.join(head)} |", f"|{'--:|' * len(head)}"]
    for result in results:
        if not result.seconds:
            lines.append(f"| {result.batch} | out of memory |{' |' * (len(head) - 2)}")
            continue
        rate = result.views_per_s
        cells = [
            str(result.batch),
            f"{statistics.median(result.seconds) * 1000:.2f}",
            f"{min(result.seconds) * 1000:.2f} to {max(result.seconds) * 1000:.2f}",
            f"{rate:.1f}",
            f"{rate / VIEWS_OF_A_PHOTO:.2f}",
            f"{rate * operations / 1e12:.2f}",
        ]
        cells += [f"{rate * operations / peak:.1%}"] if peak else []
        cells += [f"{result.peak_bytes / 2**30:.1f}" if result.peak_bytes else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def hardware(device: torch.device) -> str:
    """Description of the device."""
    if device.type != "cuda":
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    gpu = torch.cuda.get_device_properties(device)
    return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Forward pass of a backbone with random weights.")
    parser.add_argument("--backbone", default="dinov3_vith16plus", help="a name of the package's table")
    parser.add_argument("--size", type=int, default=None, help="side of a view in px (default: auto)")
    parser.add_argument("--batches", type=int, nargs="+", default=[12, 24, 48, 96, 192, 384])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--attention", choices=("auto", "sdpa", "flash"), default="auto")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parsed = parser.parse_args(arguments)
    if min(*parsed.batches, parsed.repeats, 1) < 1 or parsed.warmup < 0:
        parser.error("--batches and --repeats must be at least 1, --warmup at least 0")
    return parsed


def run(options: argparse.Namespace, command: str) -> str:
    """Measure, and return the results as Markdown."""
    device = torch.device(options.device)
    backbone = build_random(
        options.backbone, device=device, dtype=DTYPES[options.dtype], attention=options.attention
    )
    size = backbone.view_size("auto" if options.size is None else options.size)
    operations = operations_per_view(options.backbone, size)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = bf16_peak(name) if options.dtype == "bf16" else None
    results = [
        measure(backbone, batch, size, options.repeats, options.warmup) for batch in sorted(options.batches)
    ]
    parameters = sum(p.numel() for p in backbone.parameters())
    rate = (
        f"peak: {peak / 1e12:.0f} TFLOP/s (dense bf16)" if peak else f"peak: not known for {name}, no share"
    )
    return "\n".join(
        [
            f"{date.today().isoformat()} · `{command}` · {hardware(device)} · torch {torch.__version__}, "
            f"transformers {version('transformers')}",
            "",
            f"{options.backbone}, random weights, {parameters / 1e6:.1f} M parameters, views of {size} px, "
            f"{options.dtype}, attention: {attention_of(backbone, size)}, "
            f"{operations / 1e12:.4f} TFLOP a view, {rate}; median of {options.repeats}, "
            f"photo = {VIEWS_OF_A_PHOTO} views.",
            "",
            table(results, operations, peak),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns 2 if the machine or the options do not fit."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks/backbone.py needs a GPU and this machine has none: use a machine with a GPU, or "
            "--device cpu --backbone dinov3_vits16 --size 224 --batches 1",
            file=sys.stderr,
        )
        return 2
    try:
        print(run(options, shlex.join(["python", "benchmarks/backbone.py", *given])))
    except RoadworkError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
