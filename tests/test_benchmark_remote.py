"""The benchmark of reading from a server runs; what it measures is not judged here."""

import pytest

pytest.importorskip("webdataset")


def test_it_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    import data_remote

    small = "--photos 32 --side 64 --shards 8 --latency_ms 0 --mb_per_s 1000 --step_ms 0 --turns 2"
    data_remote.main(small.split())
    printed = capsys.readouterr().out
    assert "32 synthetic photos, 8 shards" in printed
    for way in ("ours, empty cache", "ours, second epoch", "webdataset", "webdataset, two processes"):
        assert f"| 0 ms | {way} |" in printed
    assert "| ours, at the exact row |" in printed
    assert "| webdataset, passing over what was read |" in printed
