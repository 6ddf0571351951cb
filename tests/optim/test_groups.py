"""Which parameters are decayed."""

import torch
from torch import nn

from roadwork_dist.optim.groups import parameter_groups


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
