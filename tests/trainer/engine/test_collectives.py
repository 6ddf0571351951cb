"""What processes tell each other, with real processes."""

from typing import Any

import torch
from support.ranks import run

from roadwork_dist.common.errors import DataError
from roadwork_dist.trainer.engine.accelerator import build_accelerator
from roadwork_dist.trainer.engine.collectives import (
    broadcast_object,
    gather_objects,
    gather_results,
    gather_rows,
    sum_over_ranks,
    world_size,
)

CPU = torch.device("cpu")


def talk() -> dict[str, Any]:
    accelerator = build_accelerator(device="cpu")
    rank = accelerator.process_index
    # Rank r holds r rows: the first none at all.
    rows = {"logits": torch.full((rank, 2), float(rank)), "label": torch.full((rank,), rank)}
    return {
        "world": world_size(),
        # In float32 2**24 + 1 is 2**24.
        "sum": sum_over_ranks([2.0**24, 1.0, rank], CPU),
        "objects": gather_objects({"rank": rank}),
        "broadcast": broadcast_object(f"from {rank}"),
        "broadcast from the last": broadcast_object(rank, source=world_size() - 1),
        "rows": {name: tensor.tolist() for name, tensor in gather_rows(rows).items()},
        # A rank without a batch does not even know the names.
        "some without names": gather_rows({"a": torch.tensor([rank])} if rank else {}),
        "none": gather_rows({}),
    }


def test_three_processes() -> None:
    for told in run(talk, world_size=3):
        assert told["world"] == 3
        assert told["sum"] == [3 * 2.0**24, 3.0, 3.0]
        assert told["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert told["broadcast"] == "from 0"
        assert told["broadcast from the last"] == 2
        assert told["rows"] == {"logits": [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]], "label": [1, 2, 2]}
        assert told["some without names"]["a"].tolist() == [1, 2]
        assert told["none"] == {}


def sum_in_float64() -> list[float]:
    build_accelerator(device="cpu")
    return sum_over_ranks([2.0**24 + 1, 0.1], CPU)


def test_sums_are_made_in_float64() -> None:
    for total in run(sum_in_float64, world_size=2):
        assert total == [2.0**25 + 2, 0.2]  # float32 would lose the 2, and give 0.2000000030


def test_one_process_gets_back_what_it_gave() -> None:
    assert world_size() == 1
    assert sum_over_ranks([1.5, 2.0], CPU) == [1.5, 2.0]
    assert gather_objects("a") == ["a"]
    assert broadcast_object("a") == "a"
    rows = gather_rows({"a": torch.ones(2, requires_grad=True)})
    assert rows["a"].tolist() == [1.0, 1.0]
    assert not rows["a"].requires_grad


def share_that_fails(failing: int) -> str:
    """What a rank ends with when one rank's share of the work fails."""
    rank = build_accelerator(device="cpu").process_index

    def work() -> int:
        if rank == failing:
            raise DataError(f"rank {rank} cannot read")
        return 10 * rank

    try:
        return str(gather_results(work))
    except DataError as error:
        return str(error)


def test_results_of_all_shares_or_the_error_of_one_on_every_rank() -> None:
    assert run(share_that_fails, 9, world_size=2) == ["[0, 10]"] * 2
    assert run(share_that_fails, 1, world_size=2) == ["rank 1 cannot read"] * 2
    assert gather_results(lambda: "alone") == ["alone"]
