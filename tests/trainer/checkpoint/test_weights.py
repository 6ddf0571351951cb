"""Which tensors a checkpoint holds, and who the others are."""

from pathlib import Path

import pytest
import torch
from support.toy import toy_config, toy_data
from torch import Tensor, nn

from roadwork_dist.common.errors import CheckpointError
from roadwork_dist.trainer.checkpoint.weights import check_same_model, frozen_identity, trained_tensors
from roadwork_dist.trainer.trainer import Trainer


class FrozenBackbone(nn.Module):
    """A frozen part with running statistics that stays in eval mode, and a head with some of its own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width)).requires_grad_(False)
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, 2))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.train()

    def train(self, mode: bool = True) -> "FrozenBackbone":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.backbone(inputs))


HEAD = {
    "head.0.weight",
    "head.0.bias",
    "head.0.running_mean",
    "head.0.running_var",
    "head.0.num_batches_tracked",
    "head.1.weight",
    "head.1.bias",
}


def test_trained_are_parameters_with_gradients_and_buffers_in_train_mode() -> None:
    assert trained_tensors(FrozenBackbone()).keys() == HEAD


def test_a_frozen_norm_left_in_train_mode_still_moves_and_is_stored() -> None:
    model = FrozenBackbone()
    model.backbone.train()
    statistics = {f"backbone.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert trained_tensors(model).keys() == HEAD | statistics


@pytest.mark.parametrize("name", ["backbone.0.weight", "backbone.1.bias", "backbone.1.running_var"])
def test_the_identity_changes_with_one_bit_of_a_frozen_tensor(name: str) -> None:
    model = FrozenBackbone()
    before = frozen_identity(model)
    assert before == frozen_identity(FrozenBackbone())
    model.state_dict()[name].view(-1)[:1].view(torch.int32).bitwise_xor_(1)
    assert frozen_identity(model) != before


@pytest.mark.parametrize("name", sorted(HEAD))
def test_the_identity_does_not_change_with_training(name: str) -> None:
    model = FrozenBackbone()
    before = frozen_identity(model)
    model.state_dict()[name].add_(1)
    assert frozen_identity(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_identity_knows_the_dtype(dtype: torch.dtype) -> None:
    model = FrozenBackbone()
    before = frozen_identity(model)
    model.backbone.to(dtype)
    assert frozen_identity(model) != before


def test_the_identity_counts_a_backbone_that_lies_elsewhere() -> None:
    first, second = FrozenBackbone(), FrozenBackbone()
    first.backbone_identity, second.backbone_identity = {"name": "a"}, {"name": "b"}  # type: ignore[assignment]
    assert frozen_identity(first) != frozen_identity(second)


def test_a_checkpoint_of_another_model_is_told() -> None:
    own = {name: tensor.shape for name, tensor in trained_tensors(FrozenBackbone()).items()}
    check_same_model(own, own, Path("step-00000001"))
    stored = {**own, "head.1.weight": torch.Size([3, 8]), "head.9.weight": torch.Size([1])}
    del stored["head.0.bias"]
    with pytest.raises(CheckpointError) as caught:
        check_same_model(own, stored, Path("step-00000001"))
    told = str(caught.value)
    assert told.startswith("step-00000001 is of another model: ")
    assert "missing ['head.0.bias'], unknown ['head.9.weight'], other shape ['head.1.weight']" in told


def test_a_run_refuses_another_model_and_changes_nothing(tmp_path: Path) -> None:
    Trainer(FrozenBackbone(), toy_config(tmp_path, epochs=1), toy_data(16)).fit()
    other = FrozenBackbone()
    other.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
    before = other.head[1].weight.clone()
    with pytest.raises(CheckpointError, match=r"other shape \['head.1.bias', 'head.1.weight'\]"):
        Trainer(other, toy_config(tmp_path, epochs=2), toy_data(16)).fit()
    assert torch.equal(other.head[1].weight, before)


def test_a_checkpoint_is_of_the_size_of_what_is_trained(tmp_path: Path) -> None:
    model = FrozenBackbone(width=4096)
    model.head = nn.Sequential(nn.Linear(4096, 16), nn.Linear(16, 2))
    model.backbone.append(nn.Linear(4096, 4096).requires_grad_(False))
    Trainer(model, toy_config(tmp_path, epochs=1), toy_data(16)).fit()
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    stored = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert frozen > 100 * trained
    assert stored < 10 * trained  # in fact four: weights, average and AdamW's two moments


class Remembering(nn.Linear):
    """Keeps what is no tensor in its state dict, as quantised and fp8 layers do."""

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"seen": 3}


def test_a_module_with_extra_state_trains_and_goes_on(tmp_path: Path) -> None:
    for epochs in (1, 2):
        config = toy_config(tmp_path, epochs=epochs)
        trainer = Trainer(nn.Sequential(Remembering(6, 2)), config, toy_data(16), toy_data(8)).fit()
        assert trainer.state.epoch == epochs
