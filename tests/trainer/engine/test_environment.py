"""Variables of a launcher that are incomplete or no numbers."""

import pytest

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.trainer.engine.accelerator import build_accelerator

WRONG = {
    "local rank alone": ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set, RANK, WORLD_SIZE is not"),
    "no world size": ({"LOCAL_RANK": "0", "RANK": "0"}, "LOCAL_RANK is set, WORLD_SIZE is not"),
    "empty": ({"WORLD_SIZE": ""}, "WORLD_SIZE='' is no whole number"),
    "a word": ({"RANK": "first", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK='first' is no whole number"),
}


@pytest.mark.parametrize(("variables", "told"), WRONG.values(), ids=WRONG)
def test_an_incomplete_environment_is_refused_in_one_line(
    variables: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        build_accelerator(device="cpu")
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
