"""Guarded imports."""

import json
import sys
from types import ModuleType

import pytest

from roadwork_dist.common.errors import MissingDependencyError, RoadworkError
from roadwork_dist.common.optional import require


def test_an_installed_package_is_imported() -> None:
    assert require("json", extra="x", purpose="this test") is json


def test_a_missing_one_names_who_needs_it_and_its_extra() -> None:
    with pytest.raises(MissingDependencyError) as caught:
        require("absent_package", extra="wandb", purpose="tracking.wandb")
    told = str(caught.value)
    assert told.startswith("tracking.wandb needs the package 'absent_package'")
    assert told.endswith("install it with `pip install 'roadwork-dist[wandb]'`")
    assert isinstance(caught.value, RoadworkError)
    assert isinstance(caught.value, ImportError)


def test_a_broken_one_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> ModuleType | None:
            if name == "broken_package":
                raise ImportError("libfoo.so.1 is missing")
            return None

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(MissingDependencyError, match=r"cannot be imported \(libfoo\.so\.1 is missing\)"):
        require("broken_package", extra="x", purpose="this test")
