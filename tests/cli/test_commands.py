"""The commands on a tiny synthetic set, in this process."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from support.tiny_run import tiny_arguments, tiny_set

from roadwork_dist.cli.main import main
from roadwork_dist.demo.synthetic.dataset import SyntheticSet
from roadwork_dist.inference.predictor import Predictor


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSet:
    return tiny_set(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="module")
def trained(data: SyntheticSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    assert main(["pretrain", *tiny_arguments(data, folder)]) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


def images(data: SyntheticSet) -> Path:
    return data.folder / "images"


# predict


def test_what_was_trained_in_bf16_is_evaluated_and_predicted_in_bf16(
    data: SyntheticSet, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    quick = ("--precision=bf16", "--eval.report=false", "--data.target=null")
    assert main(["pretrain", *tiny_arguments(data, tmp_path), *quick]) == 0
    before = (run / "predictions.parquet").read_bytes()
    (run / "predictions.parquet").unlink()
    assert main(["evaluate", str(run)]) == 0
    assert (run / "predictions.parquet").read_bytes() == before
    own = pd.read_parquet(run / "predictions.parquet")
    predictor = Predictor.from_pretrained(run, device="cpu")
    # The store keeps features in bf16 and the backbone computes in it: fp32 logits differ by less than that.
    (seen,) = predictor.predict([images(data) / f"{own['id'][0]}.jpg"])
    assert torch.tensor(seen.logit_1).bfloat16().item() == seen.logit_1
    assert seen.logit_1 == pytest.approx(own["logit_1"][0], abs=0.01)


def test_predict_writes_each_format(trained: Path, data: SyntheticSet, tmp_path: Path) -> None:
    photos = [str(images(data) / "val-00000.jpg"), str(images(data))]
    tables = {}
    for suffix, model in (("csv", trained), ("jsonl", trained / "best"), ("parquet", trained)):
        output = tmp_path / f"predictions.{suffix}"
        arguments = ["--model", str(model), "--output", str(output), "--workers", "0", *photos]
        assert main(["predict", *arguments]) == 0
        tables[suffix] = output
    frames = [
        pd.read_csv(tables["csv"], converters={"view_gates": json.loads}),
        pd.read_json(tables["jsonl"], lines=True),
        pd.read_parquet(tables["parquet"]).assign(view_gates=lambda f: f["view_gates"].map(list)),
    ]
    expected = next(iter(Predictor.from_pretrained(trained, device="cpu").predict([photos[0]])))
    for frame in frames:
        assert len(frame) == 16  # the photo that is named twice is there once
        assert frame["id"][0] == photos[0]
        assert frame["probability"][0] == pytest.approx(expected.probability, abs=1e-6)
        assert list(frame["prediction"]) == list((frame["probability"] > threshold_of(trained)).astype(int))
        assert frame["view_gates"][0] == pytest.approx(expected.view_gates, abs=1e-6)
        assert list(frame["id"][1:]) == sorted(frame["id"][1:])
    assert not list(tmp_path.glob(".*"))


def threshold_of(run: Path) -> float:
    return float(json.loads((run / "best" / "decision.json").read_text())["threshold"])


@pytest.mark.parametrize("workers", ["0", "1"])
def test_predict_keeps_going_over_broken_files(
    trained: Path, data: SyntheticSet, tmp_path: Path, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos" / "deep"
    folder.mkdir(parents=True)
    whole = (images(data) / "val-00000.jpg").read_bytes()
    (folder / "a-whole.JPG").write_bytes(whole)
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("hello")
    (folder / "truncated.jpeg").write_bytes(whole[: len(whole) // 2])
    (folder / "z-whole.jpg").write_bytes(whole)
    (folder / "notes.txt").write_text("no photo")
    (folder / "._hidden.jpg").write_text("left by a file manager")
    output = tmp_path / "out.csv"
    arguments = ["--output", str(output), "--workers", workers, "--batch_size", "1", str(folder.parent)]
    assert main(["predict", "--model", str(trained), *arguments]) == 3
    frame = pd.read_csv(output)
    assert list(frame["id"]) == [str(folder / "a-whole.JPG"), str(folder / "z-whole.jpg")]
    assert frame["probability"].nunique() == 1
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "3 of 5 photos could not be read:"
    assert [Path(line.strip().split(":")[0]).name for line in told[1:]] == [
        "empty.png",
        "text.jpg",
        "truncated.jpeg",
    ]


def test_predict_of_broken_files_alone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jpg").write_text("hello")
    output = tmp_path / "out.parquet"
    assert main(["predict", "--model", str(trained), "--output", str(output), str(tmp_path)]) == 3
    assert len(pd.read_parquet(output)) == 0
    assert "1 of 1 photos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "output", "path", "says"),
    [
        ("run", "o.csv", "nowhere", "there is no such file or folder"),
        ("run", "o.csv", "empty", "holds no photo"),
        ("run", "o.xls", "photo.jpg", "the suffix '.xls', expected one of .parquet, .csv, .jsonl"),
        ("run", "o", "photo.jpg", "no suffix"),
        ("run", "missing/o.csv", "photo.jpg", "does not exist"),
        ("run", "folder.csv", "photo.jpg", "is a folder"),
        ("empty", "o.csv", "photo.jpg", "holds no saved model"),
        ("nowhere", "o.csv", "photo.jpg", "is not a folder: expected a run folder"),
    ],
)
def test_predict_refuses(
    run: Path,
    data: SyntheticSet,
    model: str,
    output: str,
    path: str,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = run.parent
    (root / "empty").mkdir()
    (root / "folder.csv").mkdir()
    shutil.copy(images(data) / "val-00000.jpg", root / "photo.jpg")
    arguments = ["--model", str(root / model), "--output", str(root / output), str(root / path)]
    assert main(["predict", *arguments]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert says in told[0]


# evaluate


def test_evaluate_gives_the_run_s_own_figures_to_the_bit(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("predictions.parquet", "evaluation.json", "best/decision.json")
    before = {name: (run / name).read_bytes() for name in names}
    for name in names[:2]:
        (run / name).unlink()
    assert main(["evaluate", str(run)]) == 0
    assert {name: (run / name).read_bytes() for name in names} == before
    text = capsys.readouterr().out
    assert "features of" in text  # from the store that training filled
    assert "val (the threshold and the best epoch were chosen on these): 4 labelled synthetic photos" in text
    assert "target: 4 labelled synthetic photos" in text
    assert "95 % interval" in text


def test_evaluate_other_photos_with_the_run_s_threshold(run: Path, data: SyntheticSet) -> None:
    own = (run / "evaluation.json").read_bytes()
    (run / "best" / "decision.json").write_text('{"threshold": 0.125}')
    assert main(["evaluate", str(run / "best"), "--data", str(data.train)]) == 0
    (figures,) = (run / "evaluations").glob("*.json")
    (result,) = json.loads(figures.read_text()).values()
    assert (result["scored"], result["threshold"]) == (8, 0.125)
    frame = pd.read_parquet(figures.with_suffix(".parquet"))
    assert set(frame["id"]) == {f"train-{n:05d}" for n in range(8)}
    assert (run / "evaluation.json").read_bytes() == own


def test_evaluate_at_another_threshold_into_a_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = (run / "evaluation.json").read_bytes()
    output = tmp_path / "low.json"
    assert main(["evaluate", str(run), "--threshold", "0", "--output", str(output)]) == 0
    assert "val (the best epoch was chosen on these): 4 labelled" in capsys.readouterr().out
    results = json.loads(output.read_text())
    assert {split: r["threshold"] for split, r in results.items()} == {"val": 0, "target": 0}
    assert results["val"]["confusion"]["fp"] == 2  # everything is called roadwork
    assert output.with_suffix(".parquet").is_file()
    assert (run / "evaluation.json").read_bytes() == own
    assert not (run / "evaluations").exists()


def kept_files(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("given", [(), ("--data",), ("--data", "in a folder")])
def test_evaluate_never_replaces_what_it_reads(
    run: Path, data: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, ...]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    table = folder / "metadata.parquet"
    pd.read_csv(data.val).to_parquet(table)
    config = run / "config.yaml"
    if given:
        (folder / "link").symlink_to(folder)
        source = ["--data", str(folder if len(given) > 1 else table), "--image_root", str(data.folder)]
    else:
        source = []
        config.write_text(config.read_text().replace(str(data.val), str(table)))
    before = kept_files(run, folder)
    output = folder / ("link" if given else "") / "metadata.json"
    assert main(["evaluate", str(run), *source, "--output", str(output)]) == 2
    told = capsys.readouterr().err
    assert "metadata.parquet, but photos are read from it: choose another file with --output" in told
    assert kept_files(run, folder) == before


@pytest.mark.parametrize("name", ["evaluation.json", "best/../evaluation.json", "predictions.json"])
@pytest.mark.parametrize("given", [(), ("--threshold=0",), ("--data",)])
def test_evaluate_into_the_run_s_own_files_is_refused(
    run: Path, data: SyntheticSet, capsys: pytest.CaptureFixture[str], name: str, given: tuple[str, ...]
) -> None:
    before = kept_files(run)
    arguments = [*given, str(data.train)] if given == ("--data",) else list(given)
    assert main(["evaluate", str(run), *arguments, "--output", str(run / name)]) == 2
    assert "the run's own figures or predictions: choose another file" in capsys.readouterr().err
    assert kept_files(run) == before


def test_evaluate_refuses_another_backbone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((run / "best" / "config.json").read_text())
    config["backbone"]["sha256"] = "0" * 64
    (run / "best" / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", str(run)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "has other weights" in told[0]
    assert "000000000000…" in told[0]


# report


def test_report_shows_the_worst_errors_with_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    assert main(["report", str(run), "--threshold", "0"]) == 0  # every photo without roadwork is an error
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {run / 'report.html'}"
    assert (run / "report.html").read_text().count("data:image/jpeg") == 4  # two a split, one view each


def test_report_without_the_photos_says_so(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("val.csv", "gone.csv"))
    assert main(["report", str(run), "--threshold", "0"]) == 0
    page = (run / "report.html").read_text()
    assert page.count("data:image/jpeg") == 2  # the target's
    assert "is not in the run's sources" in page.replace("&#39;", "'")


# data check and doctor


def test_data_check_of_all_sources(
    data: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", *tiny_arguments(data, tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"train: {data.train}: 8 photos, 8 readable, 0 unreadable" in text
    assert "labels: 2 no roadwork · 2 roadwork · 0 unlabelled" in text
    assert "160x120 ×8" in text
    assert "GPS-weighted sampling" in text
    assert text.splitlines()[-1] == "nothing here would stop a run"
    assert not (tmp_path / "run").exists()


def test_data_check_tells_every_problem(
    data: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "val.csv"
    empty.write_text("image,label\n")
    arguments = [*tiny_arguments(data, tmp_path), "--data.val", str(empty), "--data.target", "nowhere.csv"]
    assert main(["data", "check", *arguments]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "val.csv: has no rows" in told[0]
    assert "nowhere.csv: there is no such file" in told[1]
    assert "data.target" in told[1]


def test_data_check_without_a_validation_source(
    data: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*tiny_arguments(data, tmp_path), "--data.val=null", "--data.val_share=0.25"]
    assert main(["data", "check", *arguments, "--gps.enabled=false"]) == 0
    assert "split off from train: 2 for validation, 6 stay" in capsys.readouterr().out


def test_doctor_says_what_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for start in (
        "  ✓ Python ",
        "  ✓ torch ",
        "  ✓ attention ",
        "  ✓ efficientnet_lite0 ",
        "  ✓ SLURM job          4711 on node[1-2]",
        "  ✓ launcher           RANK=0",
        "  – SLURM              no sbatch and srun on PATH",
    ):
        assert any(line.startswith(start) for line in lines), start
    absent = [number for number, line in enumerate(lines) if line.startswith("  – ")]
    told = [number for number in absent if "→" in lines[number + 1]]
    assert len(told) == len(absent)
