"""The benchmarks run; what they measure is not judged here."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.paths import ROOT

FOLDER = ROOT / "benchmarks"


def load(name: str) -> ModuleType:
    spec = spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def backbone() -> ModuleType:
    return load("backbone")


def test_backbone_prints_a_table(backbone: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    settings = "--device cpu --backbone dinov3_vits16 --size 32 --batches 2 1 --repeats 2 --warmup 0"
    assert backbone.main(settings.split()) == 0
    printed = capsys.readouterr().out
    assert f"`python benchmarks/backbone.py {settings}`" in printed
    assert f"torch {torch.__version__}" in printed
    assert "dinov3_vits16, random weights, 21.6 M parameters, views of 32 px, bf16" in printed
    assert "attention: sdpa (" in printed
    assert "peak: not known for CPU, no share" in printed
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "|--" in line
    ]
    assert len(rows) == 1
    body = printed.split("|--:")[-1].splitlines()[1:]
    assert [line.split("|")[1].strip() for line in body] == ["1", "2"]
    assert all(len(line.split("|")) == len(rows[0]) + 2 for line in body)


def test_backbone_without_a_gpu_says_so_in_one_line(
    backbone: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backbone.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "needs a GPU" in captured.err


def test_backbone_counts_what_the_network_computes(backbone: ModuleType) -> None:
    # ViT-S/16, 4 registers, 64 px: 16 patches, so 21 tokens, 12 blocks of width 384. By hand, a
    # multiplication and an addition being two operations:
    tokens, width, blocks = 1 + 4 + 16, 384, 12
    patches = 2 * 16 * width * (3 * 16 * 16)
    linear = 2 * tokens * (4 * width * width + 2 * width * 4 * width)  # q, k, v, out; up, down
    attention = 2 * 2 * tokens * tokens * width  # scores, weighted values
    assert backbone.operations_per_view("dinov3_vits16", 64) == patches + blocks * (linear + attention)


def test_backbone_reports_rates_and_shares(backbone: ModuleType) -> None:
    results = [backbone.Result(24, [0.5, 0.1, 0.2], 2**31), backbone.Result(48, [])]
    text = backbone.table(results, operations=10**12, peak=1e15).splitlines()
    # 24 views in a median of 0.2 s: 120 views/s, 10 photos/s, 120e12 operations/s of 1e15.
    assert text[2] == "| 24 | 200.00 | 100.00 to 500.00 | 120.0 | 10.00 | 120.00 | 12.0% | 2.0 |"
    assert text[3].startswith("| 48 | out of memory |")
    assert {line.count("|") for line in text} == {9}


def test_checkpoint_prints_two_tables(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("checkpoint")
    settings = "--millions 0.1 --every 2 --saves 2 --turns 1 --resumes 1"
    assert benchmark.main(settings.split()) == 0
    printed = capsys.readouterr().out
    assert f"python benchmarks/checkpoint.py {settings}" in printed
    for name in ("roadwork_dist", "roadwork_dist, asynchronous", "save_state"):
        assert f"| {name} | " in printed
    first, second = (line.split("|") for line in printed.splitlines()[-2:])
    assert [first[1].strip(), second[1].strip()] == ["10", "100,000"]
    # Nothing that was trained on before is read again: only what the first two steps need.
    assert first[3] == second[3]
    assert int(first[3]) <= 16


def test_engines_prints_a_row_of_two_processes(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("engines")
    assert benchmark.main(["--engines", "ddp", "--steps", "5", "--turns", "2"]) == 0
    head, _, row = capsys.readouterr().out.splitlines()[-3:]
    assert head.count("|") == row.count("|")
    name, bare, _, own, _, added, _, times = (cell.strip() for cell in row.strip("|").split("|"))
    assert name == "ddp"
    assert float(bare) > 0
    assert float(own) - float(bare) == pytest.approx(float(added), abs=0.002)  # medians of two turns
    assert float(times) > 0


def test_data_runs_every_part_and_tells_that_one_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load("data")
    started: list[str] = []

    def run(command: list[str]) -> SimpleNamespace:
        started.append(Path(command[1]).name)
        assert Path(command[1]).is_file()
        return SimpleNamespace(returncode=3 if "shards" in command[1] else 0)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    assert benchmark.main([]) == 3
    assert started == ["data_views.py", "data_shards.py", "data_remote.py", "data_store.py"]
    with pytest.raises(SystemExit):
        benchmark.main(["wievs"])
