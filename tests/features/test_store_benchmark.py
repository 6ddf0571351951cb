"""The benchmark of the store runs; what it measures is not judged here."""

import data_store
import pytest


def test_a_small_store_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_store, "FILES", 64)
    assert data_store.main(["large", "--photos", "2000", "--turns", "2", "--reads", "1024"]) == 0
    printed = capsys.readouterr().out
    for name in ("| 1,000 | ", "| 2,000 | ", "| one file a photo (torch.load) | ", "| store | "):
        assert name in printed
    assert data_store.table([["way", "seconds"], ["a", "1"]]) == "| way | seconds |\n|---|--:|\n| a | 1 |"


def test_training_from_the_store_is_measured() -> None:
    printed = data_store.head_table(1, 2, width=8, settings=["--model.width=64", "--model.layers=1"])
    for name in ("batches in memory", "store, in memory", "store, mapped", "store, row by row"):
        assert printed.count(f"\n| {name} | ") == 2
    with pytest.raises(SystemExit):
        data_store.main(["haed"])
