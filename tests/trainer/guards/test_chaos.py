"""The chaos script's short version: a few attacks on a run under its real launcher."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from support.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "chaos.py"


@pytest.fixture(scope="module")
def chaos() -> ModuleType:
    spec = spec_from_file_location("benchmark_chaos", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_runs_that_are_attacked_end_like_an_undisturbed_one(
    chaos: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "ATTACKS", ("kill the launcher",))  # the others have tests of their own
    settings = "--engine ddp --kills 1 --steps 12"
    assert chaos.main(settings.split()) == 0
    printed = capsys.readouterr().out
    row = [cell.strip() for cell in printed.splitlines()[-2].split("|")]
    assert row[1] == "ddp"
    attacks, ended, alike = map(int, row[3:6])
    assert attacks == 1
    assert ended == alike >= 1  # a run may end before it is attacked; another one is started then
    assert row[-2] == "0"  # nobody outlived it


def test_another_end_is_told(chaos: ModuleType, tmp_path: Path) -> None:
    outcomes = []
    for number, loss in enumerate((0.5, 0.25)):
        folder = tmp_path / str(number)
        folder.mkdir()
        line = {"kind": "train", "step": 1, "loss": loss, "samples_per_s": number}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (folder / "end.json").write_text('{"sha256": "x"}')
        outcomes.append(chaos.outcome(folder))
    assert "'loss': 0.5} is {'kind': 'train', 'step': 1, 'loss': 0.25}" in chaos.difference(*outcomes)
    shorter = {"metrics": [], "weights": "x"}
    assert chaos.difference(outcomes[0], shorter) == "0 lines, expected 1"
    assert chaos.difference(shorter, {"metrics": [], "weights": "y"}) == "the weights differ"


def test_unknown_engines_are_refused(chaos: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert chaos.main(["--engine", "zero9"]) == 2
    assert "unknown engine zero9: choose of single, ddp, fsdp2" in capsys.readouterr().err
