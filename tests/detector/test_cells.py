"""What a backbone sees where: the same features as its forward pass, and a map of its last layer."""

from typing import Any

import pytest
import torch
from torch import Tensor

from roadwork_dist.common.errors import BackboneError
from roadwork_dist.config.experiment import BackboneConfig
from roadwork_dist.detector.backbone import Backbone, load_backbone
from roadwork_dist.detector.backbone.base import square_cells
from roadwork_dist.detector.backbone.timm_backbone import build_timm, wrap_timm
from roadwork_dist.detector.backbone.transformers_backbone import wrap_transformers

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def packaged() -> Backbone:
    return load_backbone(BackboneConfig(name="efficientnet_lite0", dtype="fp32"), device=CPU)


def of_timm(name: str) -> Backbone:
    return wrap_timm(name, build_timm(name)).apply_config(BackboneConfig(dtype="fp32"), CPU)


def of_transformers(kind: str) -> Backbone:
    import transformers as t

    image: dict[str, Any] = {"image_size": 64, "patch_size": 16, "intermediate_size": 64}
    configs = {
        "dinov3": lambda: t.DINOv3ViTConfig(**TINY, intermediate_size=64, num_register_tokens=4),
        "dinov2": lambda: t.Dinov2Config(**TINY, image_size=64, patch_size=16),
        "deit": lambda: t.DeiTConfig(**TINY, **image),
        "clip": lambda: t.CLIPVisionConfig(**TINY, **image),
        "siglip": lambda: t.SiglipVisionConfig(**TINY, **image),
        "convnext": lambda: t.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
    }
    net = t.AutoModel.from_config(configs[kind]())
    return wrap_transformers(kind, net).apply_config(BackboneConfig(dtype="fp32"), CPU)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (packaged, (2, 2, 1280)),
        (lambda: of_timm("test_vit"), (4, 4, 64)),
        (lambda: of_timm("resnet10t"), (2, 2, 512)),
        (lambda: of_transformers("dinov3"), (4, 4, 32)),
        (lambda: of_transformers("dinov2"), (4, 4, 32)),
        (lambda: of_transformers("deit"), (4, 4, 32)),
        (lambda: of_transformers("clip"), (4, 4, 32)),
        (lambda: of_transformers("siglip"), (4, 4, 32)),
        (lambda: of_transformers("convnext"), (2, 2, 32)),
    ],
)
def test_the_features_are_those_of_the_forward_pass(make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    backbone = make()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    features, cells = backbone.forward_cells(pixels)
    assert torch.equal(features, backbone(pixels))
    assert cells.shape == (2, *shape)
    assert not cells.requires_grad


def test_the_map_of_a_convolutional_network_is_the_right_way_up() -> None:
    backbone = packaged()
    plain = torch.full((1, 3, 224, 224), 128, dtype=torch.uint8)
    spotted = plain.clone()
    spotted[:, :, 8:40, 170:220] = 255  # top right
    change = (backbone.forward_cells(spotted)[1] - backbone.forward_cells(plain)[1]).abs().sum(dim=-1)[0]
    row, column = divmod(int(change.argmax()), change.shape[1])
    assert row < 3 < column


def test_tokens_without_a_square_grid_are_refused() -> None:
    tokens: Tensor = torch.zeros(1, 12, 4)
    with pytest.raises(BackboneError, match=r"tiny has 12 patch tokens.*set views\.select to null"):
        square_cells(tokens, "tiny")


def test_uint8_only() -> None:
    with pytest.raises(TypeError, match="expected uint8"):
        packaged().forward_cells(torch.zeros(1, 3, 64, 64))
