"""Which parameters are decayed."""

from typing import Any

import pytest
import torch
from torch import nn

from roadwork_dist.trainer.optim.groups import parameter_groups


class Everything(nn.Module):
    """Of each kind one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.convolution = nn.Conv2d(3, 4, 3)
        self.embedding = nn.Embedding(5, 4)
        self.layer_norm = nn.LayerNorm((2, 4))  # its weight is a matrix
        self.rms_norm = nn.RMSNorm(4)
        self.batch_norm = nn.BatchNorm2d(4)
        self.null = nn.Parameter(torch.zeros(4))
        self.scale = nn.Parameter(torch.zeros(()))
        self.tied = self.linear
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def names_of(model: nn.Module, weight_decay: float = 0.1) -> list[set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, weight_decay)
    return [{names[id(p)] for p in group["params"]} for group in groups]


def test_matrices_are_decayed_but_not_those_of_norms_and_embeddings() -> None:
    decayed, _ = names_of(Everything())
    assert decayed == {"linear.weight", "convolution.weight"}


def test_biases_norms_embeddings_vectors_and_scalars_are_not() -> None:
    _, others = names_of(Everything())
    assert others == {
        "linear.bias",
        "convolution.bias",
        "embedding.weight",
        "layer_norm.weight",
        "layer_norm.bias",
        "rms_norm.weight",
        "batch_norm.weight",
        "batch_norm.bias",
        "null",
        "scale",
    }


def tiny_timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, num_classes=3)
    return model


def tiny_transformers(name: str) -> nn.Module:
    import transformers as t

    tiny: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    configs: dict[str, Any] = {
        "dinov3": lambda: t.DINOv3ViTConfig(**tiny, intermediate_size=64, num_register_tokens=4),
        "dinov2": lambda: t.Dinov2Config(**tiny, image_size=64, patch_size=16),
        "deit": lambda: t.DeiTConfig(**tiny, intermediate_size=64, image_size=64, patch_size=16),
    }
    model: nn.Module = t.AutoModel.from_config(configs[name]())
    return model


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (tiny_timm, "test_vit", {"cls_token", "pos_embed"}),
        (
            tiny_transformers,
            "dinov3",
            {"embeddings.cls_token", "embeddings.register_tokens", "embeddings.mask_token"},
        ),
        (tiny_transformers, "dinov2", {"embeddings.cls_token", "embeddings.position_embeddings"}),
        (tiny_transformers, "deit", {"embeddings.distillation_token", "embeddings.position_embeddings"}),
    ],
)
def test_tokens_and_positions_of_vision_transformers_are_not_decayed(
    make: Any, name: str, expected: set[str]
) -> None:
    model = make(name)
    decayed, others = names_of(model)
    assert expected <= others
    words = ("token", "pos_embed", "position", "bias", "norm")
    assert not [name for name in decayed if any(word in name for word in words)]
    layers = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert decayed == layers


class Listing(nn.Module):
    """A layer of which a method says what is not decayed."""

    def __init__(self, names: Any) -> None:
        super().__init__()
        self.names = names
        self.table = nn.Parameter(torch.zeros(2, 2))
        self.inner = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def no_weight_decay(self) -> Any:
        return self.names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"table", "inner.0.weight"}, {"0.table", "0.inner.0.weight"}),
        (["inner.*.weight"], {"0.inner.0.weight", "0.inner.1.weight"}),
        ({"0.table", "elsewhere"}, set()),  # names are relative to the module
        (None, set()),
        (True, set()),
        ("table", set()),
        ([3, None], set()),
    ],
)
def test_what_a_part_says_is_not_decayed(names: Any, expected: set[str]) -> None:
    _, others = names_of(nn.Sequential(Listing(names)))
    assert {name for name in others if not name.endswith("bias")} == expected


@pytest.mark.parametrize("other", [True, nn.Identity(), lambda name: name == "table"])
def test_something_else_of_that_name_is_left_alone(other: Any) -> None:
    model = nn.Linear(2, 2)
    model.no_weight_decay = other
    assert names_of(model) == [{"weight"}, {"bias"}]


def test_each_trainable_parameter_is_there_once_and_no_frozen_one() -> None:
    model = Everything()
    given = [id(p) for group in parameter_groups(model, 0.1) for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_weight_decay_of_the_groups_and_no_empty_group() -> None:
    assert [group["weight_decay"] for group in parameter_groups(Everything(), 0.1)] == [0.1, 0.0]
    only_matrix = nn.Linear(2, 2, bias=False)
    assert [group["weight_decay"] for group in parameter_groups(only_matrix, 0.1)] == [0.1]
    assert [group["weight_decay"] for group in parameter_groups(nn.LayerNorm(2), 0.1)] == [0.0]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)


class Vit(nn.Module):
    """A ViT's order of definition: embedding, blocks, norm."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 4))
        self.patches = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(4)


class WithHead(nn.Module):
    """The head is defined first, as in the detector."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.backbone = nn.Sequential(Block(), Block()), Vit()

    def body(self) -> nn.Module:
        return self.backbone


def scales(model: nn.Module, decay: float) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1, decay)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


def test_each_layer_learns_at_a_share_of_the_rate_above_it() -> None:
    found = scales(Vit(), 0.5)
    assert found["norm.weight"] == 1.0
    assert [found[f"blocks.{n}.linear.weight"] for n in range(3)] == [0.125, 0.25, 0.5]
    assert found["blocks.1.norm.bias"] == found["blocks.1.linear.weight"]
    assert found["position"] == found["patches.weight"] == 0.0625


def test_everything_outside_the_body_is_the_topmost_layer() -> None:
    found = scales(WithHead(), 0.5)
    assert {value for name, value in found.items() if name.startswith("head.")} == {1.0}
    assert found["backbone.norm.weight"] == 0.5
    assert found["backbone.blocks.0.linear.weight"] == 0.0625
    assert found["backbone.position"] == 0.03125


def test_without_layer_decay_all_learn_alike_in_two_groups() -> None:
    assert set(scales(WithHead(), 1.0).values()) == {1.0}
    assert len(parameter_groups(WithHead(), 0.1)) == 2


def test_frozen_layers_take_part_in_counting_and_in_no_group() -> None:
    model = Vit()
    model.blocks[2].requires_grad_(False)
    found = scales(model, 0.5)
    assert not any(name.startswith("blocks.2") for name in found)
    assert found["blocks.1.linear.weight"] == 0.25
