"""``roadwork-dist checkpoint``: list, verify, consolidate, prune."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.engines import train_with
from support.ranks import run
from support.tiny_run import tiny_arguments, tiny_set
from support.toy import stored, toy_config, toy_data, toy_model

from roadwork_dist.cli.main import main
from roadwork_dist.detector.detector import RoadworkModel
from roadwork_dist.trainer.config import CheckpointConfig, EmaConfig
from roadwork_dist.trainer.trainer import Trainer


def train(run_dir: Path, average: bool = True) -> dict[str, torch.Tensor]:
    config = toy_config(
        run_dir,
        batch_size=8,
        ema=EmaConfig(enabled=average, decay=0.9),
        checkpoint=CheckpointConfig(every_steps=2, keep=9),
    )
    trainer = Trainer(toy_model(), config, toy_data(48), toy_data(9)).fit()
    return trainer.engine.whole_state()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved behind steps 2, 3 and 4, 6 by two sharding ranks."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    torch.save(run(train_with, "fsdp2", train, folder, world_size=2)[0], folder / "expected.pt")
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def damage(folder: Path, step: int) -> None:
    path = folder / "checkpoints" / f"step-{step:08d}" / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def there(folder: Path) -> list[int]:
    return sorted(int(path.name[5:13]) for path in (folder / "checkpoints").iterdir())


def test_list_shows_each_checkpoint_in_a_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = folder / "checkpoints"
    (checkpoints / "step-00000002" / "state.json").unlink()
    (checkpoints / "step-00000004").rename(checkpoints / "step-00000004.damaged")
    day_old = time.time() - 86_400
    os.utime(checkpoints / "step-00000003" / "manifest.json", (day_old, day_old))
    assert main(["checkpoint", "list", str(folder)]) == 0
    head, second, third, sixth, fourth = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "epoch", "figure", "size", "processes", "engine", "age", "complete"]
    assert second.split()[0] == "2"
    assert second.endswith("no: state.json does not match manifest.json")
    assert third.split()[:3] == ["3", "1", "mcc"]
    assert third.split()[-5:] == ["2", "fsdp2", "1", "d", "yes"]
    assert "fsdp2" in sixth
    assert sixth.split()[-1] == "yes"
    assert fourth.split()[0] == "4"
    assert fourth.endswith("no: damaged, put aside")
    assert sum(" * " in line for line in (third, sixth)) == 1  # the best one


def test_list_and_verify_take_one_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = folder / "checkpoints" / "step-00000003"
    assert main(["checkpoint", "list", str(one)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["checkpoint", "verify", str(one)]) == 0
    assert capsys.readouterr().out.startswith("step-00000003: whole, 6 files, ")


def test_verify_names_the_damaged_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(folder)]) == 0
    assert capsys.readouterr().out.count("whole") == 4
    damage(folder, 4)
    (folder / "checkpoints" / "step-00000006" / "manifest.json").unlink()
    assert main(["checkpoint", "verify", str(folder)]) == 1
    out = capsys.readouterr().out
    assert out.count("whole") == 2
    assert "step-00000004: DAMAGED: __1_0.distcp does not match its SHA-256" in out
    assert "step-00000006: DAMAGED: " in out
    assert "it has no manifest.json" in out


def test_consolidated_weights_are_whole_and_plain(folder: Path, tmp_path: Path) -> None:
    assert main(["checkpoint", "consolidate", str(folder), str(tmp_path / "out")]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    expected = torch.load(folder / "expected.pt", weights_only=True)
    toy_model().load_state_dict(weights)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert main(["checkpoint", "consolidate", str(folder), str(tmp_path / "mean"), "--average"]) == 0
    average = load_file(tmp_path / "mean" / "model.safetensors")
    shadow = stored(folder / "checkpoints" / "step-00000006")
    assert average.keys() == expected.keys()
    assert all(torch.equal(t, shadow[f"callbacks/EmaCallback/{n}"]) for n, t in average.items())
    assert not torch.equal(average["0.weight"], weights["0.weight"])


def test_consolidate_takes_the_newest_whole_one_or_the_one_asked_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder, 6)
    assert main(["checkpoint", "consolidate", str(folder), str(tmp_path / "a")]) == 0
    assert main(["checkpoint", "consolidate", str(folder), str(tmp_path / "b"), "--step", "2"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "step-00000004",
        "step-00000002",
    ]
    path = folder / "checkpoints" / "step-00000002"
    assert main(["checkpoint", "consolidate", str(path), str(tmp_path / "c")]) == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "bc")
    assert first == second


def test_prune_keeps_the_newest_whole_ones_and_the_best(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder, 6)
    assert main(["checkpoint", "prune", str(folder), "--dry_run"]) == 0
    assert "step-00000002: would be deleted" in capsys.readouterr().out
    assert there(folder) == [2, 3, 4, 6]
    assert main(["checkpoint", "prune", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "step-00000006: damaged, not deleted: inspect it" in out
    assert "step-00000002: deleted" in out
    assert there(folder) == [3, 4, 6]  # 4 is the newest whole one, 3 the best
    assert main(["checkpoint", "prune", str(folder), "--keep", "0"]) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["lisst", "x"], "unknown command 'checkpoint lisst': did you mean 'checkpoint list'?"),
        (["list", "absent"], "absent is not a folder: expected a run folder"),
        (["verify", "."], ". holds no checkpoint: expected a run folder"),
        (["prune"], "the following arguments are required: RUN"),
        (["prune", "step-00000001"], "expected the folder of its run"),
        (["consolidate", "absent", "out"], "absent is not a folder"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["checkpoint", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_what_is_not_there_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "consolidate", str(folder), str(tmp_path / "a"), "--step", "5"]) == 2
    assert "has no checkpoint of step 5: there are 2, 3, 4, 6" in capsys.readouterr().err
    for step in (2, 3, 4, 6):
        damage(folder, step)
    assert main(["checkpoint", "consolidate", str(folder), str(tmp_path / "a")]) == 2
    assert "has no intact checkpoint" in capsys.readouterr().err
    run(train, tmp_path / "plain", False)
    assert main(["checkpoint", "consolidate", str(tmp_path / "plain"), str(tmp_path / "a"), "--average"]) == 2
    assert "holds no average: its run was trained with ema.enabled false" in capsys.readouterr().err


def test_a_detector_can_be_loaded_from_consolidated_weights(tmp_path: Path) -> None:
    data = tiny_set(tmp_path / "synthetic")
    quick = ("--eval.report=false", "--data.target=null", "--epochs=1")
    assert main(["pretrain", *tiny_arguments(data, tmp_path), *quick]) == 0
    folder = tmp_path / "run"
    assert main(["checkpoint", "consolidate", str(folder), str(tmp_path / "out"), "--average"]) == 0
    model, best = (RoadworkModel.from_pretrained(path) for path in (tmp_path / "out", folder / "best"))
    for name, tensor in best.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name  # one epoch: the best is the last average
