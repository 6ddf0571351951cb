import math

import pytest
import torch

from roadwork_dist.config.batch import DAYTIME, SCENE, TEXT_WIDTH, VOCABULARIES, WEATHER, Batch
from roadwork_dist.detector.metadata import FIELDS, METADATA_WIDTH, MetadataEncoder, encode_gps

COLUMNS = {
    "gps": slice(0, 128),
    "weather": slice(128, 192),
    "daytime": slice(192, 256),
    "scene": slice(256, 320),
    "text": slice(320, 704),
}


def _batch(rows: int, *, known: bool) -> Batch:
    def word(words: tuple[str, ...]) -> torch.Tensor:
        return torch.randint(len(words), (rows,)) if known else torch.full((rows,), len(words))

    return {
        "view_mask": torch.ones(rows, 1, dtype=torch.bool),
        "gps": torch.tensor([[40.7, -74.0]]).repeat(rows, 1) * known,
        "gps_known": torch.full((rows,), known),
        "weather": word(WEATHER),
        "daytime": word(DAYTIME),
        "scene": word(SCENE),
        "text": torch.randn(rows, TEXT_WIDTH) * known,
        "text_known": torch.full((rows,), known),
    }


@pytest.fixture
def encoder() -> MetadataEncoder:
    torch.manual_seed(0)
    return MetadataEncoder(0.3).eval()


def test_gps_by_hand() -> None:
    """45° N, 90° W: the lowest frequency turns both by a quarter, the highest by 2500 whole turns."""
    code = encode_gps(torch.tensor([[45.0, -90.0]]))[0].view(4, 32)
    assert code[:, 0].tolist() == pytest.approx([1.0, 0.0, -1.0, 0.0], abs=1e-6)
    assert code[:, -1].tolist() == pytest.approx([0.0, 1.0, 0.0, 1.0], abs=5e-3)
    f = 10_000 ** (7 / 31)
    lat, lon = 45 * f * math.pi / 90, -90 * f * math.pi / 180
    expected = [math.sin(lat), math.cos(lat), math.sin(lon), math.cos(lon)]
    assert code[:, 7].tolist() == pytest.approx(expected, abs=1e-5)


def test_gps_is_computed_in_fp32_whatever_comes() -> None:
    gps = torch.tensor([[45.0, -90.0]])
    torch.testing.assert_close(encode_gps(gps.bfloat16()), encode_gps(gps))


def test_all_null_is_the_null_vectors(encoder: MetadataEncoder) -> None:
    out = encoder(_batch(2, known=False))
    assert out.shape == (2, METADATA_WIDTH) == (2, 704)
    for row in out:
        assert torch.equal(row[COLUMNS["gps"]], encoder.gps_null)
        assert torch.equal(row[COLUMNS["text"]], encoder.text_null)
        for field, words in VOCABULARIES.items():
            assert torch.equal(row[COLUMNS[field]], encoder.words[field].weight[len(words)])


def test_each_field_has_its_place(encoder: MetadataEncoder) -> None:
    batch = _batch(1, known=True)
    full, null = encoder(batch), encoder(_batch(1, known=False))
    for field in FIELDS:
        without = dict(batch)
        if field in VOCABULARIES:
            without[field] = torch.tensor([len(VOCABULARIES[field])])
        else:
            without[f"{field}_known"] = torch.tensor([False])
        out = encoder(without)
        for other in FIELDS:
            expected = null if other == field else full
            assert torch.equal(out[:, COLUMNS[other]], expected[:, COLUMNS[other]])
    gps = encoder.gps_proj(encode_gps(batch["gps"]))
    torch.testing.assert_close(full[:, COLUMNS["gps"]], gps)
    torch.testing.assert_close(full[:, COLUMNS["text"]], encoder.text_proj(batch["text"]))


def test_absent_fields_are_null(encoder: MetadataEncoder) -> None:
    bare: Batch = {"view_mask": torch.ones(2, 1, dtype=torch.bool)}
    assert torch.equal(encoder(bare), encoder(_batch(2, known=False)))


def test_what_stands_in_unknown_rows_reaches_neither_output_nor_gradient(encoder: MetadataEncoder) -> None:
    batch = _batch(3, known=True)
    batch["gps_known"][1], batch["text_known"][1] = False, False
    batch["gps"][1], batch["text"][1] = torch.nan, torch.nan
    encoder(batch).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_dropout_drops_present_fields_of_rows_independently(encoder: MetadataEncoder) -> None:
    rows = 4000
    batch, null = _batch(rows, known=True), encoder(_batch(1, known=False))
    out = encoder.train()(batch)
    dropped = torch.stack([(out[:, c] == null[:, c]).all(dim=1) for c in COLUMNS.values()])  # [5, rows]
    assert dropped.float().mean(dim=1).tolist() == pytest.approx([0.3] * 5, abs=0.03)
    assert torch.corrcoef(dropped.float()).triu(1).abs().max() < 0.06
    again = encoder.eval()(batch)
    assert not any((again[:, c] == null[:, c]).all(dim=1).any() for c in COLUMNS.values())
