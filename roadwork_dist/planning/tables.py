"""Markdown tables of the planning estimates, generated whenever the documentation is built."""

from collections.abc import Callable, Mapping, Sequence

from roadwork_dist.planning.jobs import PLANS, Plan
from roadwork_dist.planning.links import LINKS
from roadwork_dist.planning.memory import ENGINES, Engine, memory
from roadwork_dist.planning.traffic import (
    bytes_sent,
    communication_seconds,
    compute_seconds,
    efficiency,
)
from roadwork_dist.trainer.tracking.chips import bf16_peak

H100 = bf16_peak("NVIDIA H100 80GB HBM3") or 0.0
UTILISATION = 0.4
NBSP = "\u00a0"

NAMES: Mapping[Engine, str] = {
    "single": "one process",
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3, offload",
    "fsdp2": "FSDP2",
}
FILES: Mapping[Engine, str] = {
    "single": "single_gpu",
    "ddp": "ddp_8gpu",
    "zero1": "zero1",
    "zero2": "zero2",
    "zero3": "zero3",
    "zero3_offload": "zero3_offload",
    "fsdp2": "fsdp2_8gpu",
}
"""Files of ``accelerate_configs/``."""


def command(plan: Plan) -> list[str]:
    """Shell lines that start a plan on the eight GPUs of a machine."""
    options = [f"--{option.strip()}" for option in (plan.settings or "").split("--") if option.strip()]
    lines = [
        f"accelerate launch --config_file accelerate_configs/{FILES[plan.engine]}.yaml",
        "launch/pretrain.py --config natix_8gpu",
        *options,
    ]
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def engines() -> str:
    """Which engine for which job, with GB per GPU on 1, 8 and 64 GPUs, and the command line for 8."""
    rows = []
    for plan in PLANS.values():
        run = "<br>".join(f"`{line}`" for line in command(plan))
        what = f"{plan.title}<br>({plan.job.trained / 1e6:.1f} M parameters; {plan.batch_size} photos"
        what += f" x {plan.accumulation})" if plan.accumulation > 1 else ")"
        cells = [what, f"{NAMES[plan.engine]}<br>{_at_each(plan, plan.engine)}"]
        cells += [f"{NAMES[plan.sharded]}<br>{_at_each(plan, plan.sharded)}" if plan.sharded else "-"]
        rows.append([*cells, run if plan.settings else "comes with PEFT, not in this version"])
    head = ["what learns", "engine, and GB a GPU on 1 / 8 / 64", "if memory is short", "command on 8 GPUs"]
    return _table(head, rows)


def _at_each(plan: Plan, engine: Engine) -> str:
    found = [memory(plan.job, "single" if ranks == 1 else engine, ranks) for ranks in (1, 8, 64)]
    return " / ".join(_gigabytes(each.total) for each in found)


def memory_by_engine() -> str:
    """GB per GPU of every job under every engine on 1, 8 and 64 GPUs."""
    rows = []
    for plan in PLANS.values():
        for engine in ENGINES:
            cells = [plan.title, NAMES[engine]]
            for ranks in (1, 8, 64):
                is_possible = ranks == 1 or engine != "single"
                found = memory(plan.job, engine, ranks) if is_possible else None
                cells.append("" if found is None else _gigabytes(found.total))
            rows.append(cells)
    return _table(["what learns", "engine", "1 GPU", "8 GPUs", "64 GPUs"], rows, numbers=3)


def memory_by_part() -> str:
    """GB per GPU of training the whole backbone on 8 GPUs, part by part."""
    rows = []
    for engine in ENGINES[1:]:
        found = memory(PLANS["full"].job, engine, 8)
        parts = (found.weights, found.gradients, found.moments, found.average, found.buffers)
        rows.append([NAMES[engine], *map(_gigabytes, (*parts, found.activations, found.total, found.host))])
    head = ["engine", "weights", "gradients", "moments", "average", "buffers", "activations", "GPU", "host"]
    return _table(head, rows, numbers=8)


def traffic() -> str:
    """Bytes that a GPU sends in a step and the time they take, for 8, 64 and 1024 GPUs."""
    rows = []
    for name in ("head, cached features", "last blocks", "full"):
        plan = PLANS[name]
        for engine in ENGINES[1:]:
            cells = [plan.title, NAMES[engine]]
            for ranks in (8, 64, 1024):
                sent = bytes_sent(plan.job, engine, ranks, plan.accumulation)
                seconds = communication_seconds(plan.job, engine, ranks, plan.accumulation)
                cells.append(f"{sent / 1e9:.2f}{NBSP}GB, {_time(seconds)}")
            cells.append(_time(compute_seconds(plan.step_operations, H100, UTILISATION)))
            rows.append(cells)
    return _table(["what learns", "engine", "8 GPUs", "64 GPUs", "1024 GPUs", "computing"], rows, numbers=4)


def break_even() -> str:
    """Photos per GPU and micro-batch below which communication takes longer than computing."""
    rows = []
    for name in ("head, cached features", "head, online features", "last blocks", "full"):
        plan = PLANS[name]
        photo = compute_seconds(plan.operations, H100, UTILISATION)
        for engine in ("ddp", "zero1", "zero3", "fsdp2"):
            photos = [communication_seconds(plan.job, engine, ranks) / photo for ranks in (8, 64, 1024)]
            rows.append([plan.title, NAMES[engine], *map(_count, photos)])
    return _table(["what learns", "engine", "8 GPUs", "64 GPUs", "1024 GPUs"], rows, numbers=3)


def fixed_batch() -> str:
    """Whole backbone, global batch of 1,024 photos: seconds per step and share spent computing."""
    plan, rows = PLANS["full"], []
    for engine in ("ddp", "zero1", "zero3", "fsdp2"):
        cells = [NAMES[engine]]
        for ranks in (8, 64, 1024):
            photos = 1024 // ranks
            micro_batches = max(1, photos // plan.batch_size)
            compute = compute_seconds(plan.operations * photos, H100, UTILISATION)
            talk = communication_seconds(plan.job, engine, ranks, micro_batches)
            low, high = efficiency(compute, talk), efficiency(compute, talk, overlap=2 / 3)
            cells.append(f"{compute + talk:.2f} s, {low:.0%} to {high:.0%}")
        rows.append(cells)
    head = ["engine", "8 GPUs, 128 photos each", "64 GPUs, 16 each", "1024 GPUs, 1 each"]
    return _table(head, rows, numbers=3)


def links() -> str:
    """Speeds of links, with their sources."""
    rows = [
        [link.name, f"{link.bandwidth / 1e9:g} GB/s", f"{link.latency[0] * 1e6:g} us", link.source]
        for link in LINKS.values()
    ]
    return _table(["link", "one direction", "a hop", "source"], rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "engines": engines,
    "memory_by_engine": memory_by_engine,
    "memory_by_part": memory_by_part,
    "traffic": traffic,
    "break_even": break_even,
    "fixed_batch": fixed_batch,
    "links": links,
}
"""Tables by the name in a page's placeholder line ``<!-- planning: NAME -->``."""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """A Markdown table; the last ``numbers`` columns are right-aligned, repeated first cells left empty."""
    rules = ["---"] * (len(head) - numbers) + ["--:"] * numbers
    lines, before = [f"| {' | '.join(head)} |", f"|{'|'.join(rules)}|"], ""
    for row in rows:
        first = "" if row[0] == before else row[0]
        before = row[0]
        lines.append(f"| {' | '.join([first, *row[1:]])} |")
    return "\n".join(lines)


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.1f}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f}{NBSP}s"
    return f"{seconds * 1000:.0f}{NBSP}ms" if seconds >= 0.01 else f"{seconds * 1000:.2g}{NBSP}ms"
