"""What the command line costs before it does anything, and how it takes mistakes."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from roadwork_dist.cli.main import COMMANDS, main
from roadwork_dist.demo.synthetic.dataset import SyntheticSet

HEAVY = {"torch", "transformers", "timm", "pandas", "sklearn", "datasets", "accelerate", "pyarrow"}


def loaded_after(code: str) -> set[str]:
    code += "\nimport sys\nprint('loaded:', *sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.splitlines()[-1].removeprefix("loaded:").split())


def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_after("from roadwork_dist.cli.main import main; assert main(['--help']) == 0")
    assert "roadwork_dist" in loaded
    assert not loaded & (HEAVY | {"numpy", "yaml", "rich", "jsonargparse"})


def test_help_of_every_command_loads_nothing_heavy() -> None:
    loaded = loaded_after(
        "from roadwork_dist.cli.main import COMMANDS, main\n"
        "for command in set(COMMANDS) - {'demo-real'}:\n"
        "    try:\n"
        "        code = main([command, '--help'])\n"
        "    except SystemExit as stop:\n"
        "        code = stop.code\n"
        "    assert not code, command\n"
    )
    assert not loaded & HEAVY


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main([command, "--help"])
    except SystemExit as stop:
        code = stop.code
    assert not code
    text = capsys.readouterr().out
    assert f"roadwork-dist {command}" in text
    assert main(["--help"]) == 0
    assert f"  {command} " in capsys.readouterr().out


def one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that a user's mistake stops."""
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["predikt"], "did you mean 'predict'?"),
        (["pretrain", "--optim.rl", "1"], "did you mean 'optim.lr'?"),
        (["pretrain", "--config", "demmo"], "did you mean 'demo'?"),
        (["pretrain", "--epochs", "0"], "epochs is 0, expected an integer >= 1"),
        (["pretrain", "--epochs", "many"], "epochs"),
        (["pretrain", "--precision", "fp6"], "precision"),
        (["data", "chekc"], "did you mean 'data check'?"),
        (["data", "check", "--data.trian", "x"], "did you mean 'data.train'?"),
        (["predict", "--modle", "runs/x"], "did you mean --model;"),
        (["predict", "x.jpg"], "required: --model, --output"),
        (["evaluate", "runs/x", "--treshold", "1"], "did you mean --threshold;"),
        (["evaluate", "runs/x", "--threshold", "2"], "'2' is not a number from 0 to 1"),
        (["evaluate", "nowhere"], "nowhere is not a folder: expected a run folder"),
        (["report", "nowhere"], "nowhere is not a folder: expected a run folder"),
        (["doctor", "--verbose"], "unknown option --verbose;"),
        (["synth", "x", "--sede", "1"], "did you mean --seed;"),
        (["synth", "x", "--workers", "two"], "'two' is not an integer >= 0"),
        (["synth", "x", "--train", "0", "--val", "0", "--target", "0"], "expected at least one photo"),
        (
            ["synth", "x", "--train", "3", "--val", "0", "--target", "1", "--large", "5"],
            "--large is 5, expected 0 to",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in one_line(arguments, capsys)


@pytest.mark.parametrize(("train", "large"), [(3, 4), (264, 48)])
def test_a_small_synthetic_set_needs_no_number_of_large_photos(
    train: int, large: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def write(out: Path, *, n_large: int, **_: object) -> SyntheticSet:
        asked.append(n_large)
        return SyntheticSet(out, out / "train.csv", out / "val.csv", out / "target.csv", rendered=0)

    monkeypatch.setattr("roadwork_dist.demo.synthetic.dataset.write_synthetic", write)
    assert main(["synth", str(tmp_path), "--train", str(train), "--val", "0", "--target", "1"]) == 0
    assert asked == [large]


def test_an_unknown_key_of_a_file_is_fatal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 2\noptim:\n  learning_rate: 1.0e-4\n")
    line = one_line(["pretrain", "--config", str(file)], capsys)
    assert "learning_rate" in line
    assert "did you mean" in line


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "roadwork_dist.cli.main", "evaluate", str(tmp_path / "nowhere")]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=60)
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True, timeout=60)
    assert plain.returncode == 2
    assert plain.stderr.count("\n") == 1
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
    assert "DataError" in debug.stderr


def test_a_full_disk_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from roadwork_dist.cli import doctor

    def full(arguments: list[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/features/a.safetensors")

    monkeypatch.setattr(doctor, "run", full)
    assert main(["doctor"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "No space left on device: 'runs/features/a.safetensors'; make room" in told


def test_an_error_of_a_loader_process_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.data import DataLoader

    from roadwork_dist.cli import doctor
    from roadwork_dist.common.errors import DataError

    class Broken:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> None:
            raise DataError("a.jpg: truncated: restore the photo")

    def read(arguments: list[str]) -> int:
        return len(list(DataLoader(Broken(), num_workers=1)))  # type: ignore[arg-type]

    monkeypatch.setattr(doctor, "run", read)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "error: a.jpg: truncated: restore the photo\n"
