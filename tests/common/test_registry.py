"""Names and what they stand for."""

import pytest

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.registry import Registry, nearest


@pytest.fixture
def registry() -> Registry[int]:
    registry: Registry[int] = Registry("number")
    for name, value in (("one", 1), ("two", 2), ("three", 3)):
        assert registry.register(name)(value) == value  # a decorator gives back what it decorates
    return registry


def test_names_in_their_order(registry: Registry[int]) -> None:
    assert list(registry) == ["one", "two", "three"]
    assert registry["two"] == 2
    assert "two" in registry
    assert "four" not in registry
    assert 2 not in registry


def test_an_unknown_name_lists_the_choices_and_the_nearest(registry: Registry[int]) -> None:
    with pytest.raises(ConfigError) as caught:
        registry["tree"]
    assert str(caught.value) == ("unknown number 'tree': did you mean 'three'? choose one of one, two, three")


def test_an_empty_registry_has_no_hint() -> None:
    with pytest.raises(ConfigError, match=r"unknown number 'a': choose one of $"):
        Registry("number")["a"]


def test_a_name_is_taken_once(registry: Registry[int]) -> None:
    with pytest.raises(ValueError, match="number 'two' is registered twice"):
        registry.register("two")(3)
    assert registry["two"] == 2


def test_nearest_is_never_empty_where_there_are_choices() -> None:
    assert nearest("sunnny", ["rainy", "sunny", "foggy", "snowy"])[0] == "sunny"
    assert len(nearest("zzz", ["rainy", "sunny", "foggy", "snowy"])) == 3
    assert nearest("zzz", ["a"], n=3) == ["a"]
    assert nearest("zzz", []) == []
