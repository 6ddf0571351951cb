"""The repository's promises about itself: cheap imports, honest dependencies, whole documentation."""

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sklearn.datasets import load_digits
from sklearn.utils import Bunch
from support.collected import MODULES as TEST_MODULES
from support.paths import ROOT

import roadwork_dist
from roadwork_dist.config.experiment import ExperimentConfig
from roadwork_dist.config.io import presets, setting_names

PACKAGE = ROOT / "roadwork_dist"
MODULES = sorted(PACKAGE.rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

HEAVY = {"torch", "transformers", "timm", "pandas", "sklearn", "scipy", "datasets", "accelerate", "numpy"}


def declared() -> configparser.ConfigParser:
    config = configparser.ConfigParser(comment_prefixes="#")
    config.read(ROOT / "setup.cfg")
    return config


def requirements() -> list[Requirement]:
    """Runtime requirements and those of every extra, without the package's own extras."""
    config = declared()
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    found = [Requirement(line) for text in texts for line in text.splitlines() if line.strip()]
    return [requirement for requirement in found if requirement.name != "roadwork-dist"]


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]


def modules_after(code: str) -> set[str]:
    """Top-level names of all modules that a fresh interpreter holds after running ``code``."""
    code += "\nimport sys\nprint(*sorted({name.split('.')[0] for name in sys.modules}))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    return set(result.stdout.splitlines()[-1].split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = modules_after("import roadwork_dist")
    assert "roadwork_dist" in loaded
    assert not loaded & (HEAVY | {"jsonargparse", "yaml", "rich"})


def test_every_public_name_is_there() -> None:
    for name in roadwork_dist.__all__:
        assert getattr(roadwork_dist, name) is not None
    with pytest.raises(AttributeError, match="Trainor"):
        _ = roadwork_dist.Trainor


def test_dependencies_have_lower_bounds() -> None:
    for requirement in requirements():
        assert ">=" in str(requirement.specifier), f"{requirement} has no lower bound"


def test_dependencies_are_pinned_by_the_constraints() -> None:
    environment = default_environment() | {"extra": ""}
    here = {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in pins()
        if pin.marker is None or pin.marker.evaluate(environment)
    }
    for requirement in requirements():
        version = here.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not in constraints.txt: run `make constraints`"
        assert requirement.specifier.contains(version, prereleases=True)


def test_constraints_are_exact_and_name_no_place() -> None:
    for pin in pins():
        assert pin.url is None
        assert str(pin.specifier).startswith("==")
        assert "+" not in str(pin.specifier), f"{pin} is a build from elsewhere"
    assert not re.search(r"https?:|file:|--index|--find-links", (ROOT / "constraints.txt").read_text())


def third_party_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        else:
            continue
        for name in names:
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top != "roadwork_dist":
                yield top


def test_what_is_imported_is_declared() -> None:
    known = {canonicalize_name(requirement.name) for requirement in requirements()}
    distributions = packages_distributions()
    for path in MODULES:
        for module in third_party_imports(path):
            homes = {canonicalize_name(name) for name in distributions.get(module, [module])}
            assert homes & known, f"{path.relative_to(ROOT)} imports {module}, which setup.cfg does not name"


def test_data_files_travel_with_the_package() -> None:
    patterns = declared()["options.package_data"]["roadwork_dist"].split()
    files = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"}]
    assert any(path.suffix == ".yaml" for path in files)
    for path in files:
        name = path.relative_to(PACKAGE).as_posix()
        assert any(fnmatch(name, pattern) for pattern in patterns), f"{name} is no package data"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "no module docstring"


def test_imports_point_down() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [linter, "--no-cache"], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


def rooms() -> list[str]:
    """Names of the packages right below ``roadwork_dist``."""
    return sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def test_every_room_is_in_the_contract() -> None:
    layers = re.split(r"[\s|]+", declared()["importlinter:contract:rooms"]["layers"].strip())
    assert sorted(layers) == [f"roadwork_dist.{room}" for room in rooms()]


def test_the_trainer_may_import_metrics_and_common_alone() -> None:
    forbidden = declared()["importlinter:contract:trainer"]["forbidden_modules"].split()
    others = set(rooms()) - {"trainer", "metrics", "common"}
    assert sorted(forbidden) == sorted(f"roadwork_dist.{room}" for room in others)


def test_no_room_holds_more_than_a_quarter_of_the_package() -> None:
    lines = {
        room: sum(len(p.read_text().splitlines()) for p in (PACKAGE / room).rglob("*.py")) for room in rooms()
    }
    largest = max(lines, key=lines.__getitem__)
    assert lines[largest] <= sum(lines.values()) / 4, f"{largest} holds {lines[largest]} lines of {lines}"


def test_the_trainer_comes_without_the_detector() -> None:
    code = "from roadwork_dist import Callback, TrainConfig, Trainer"
    assert not modules_after(code) & {"PIL", "jsonargparse", "torchvision", "timm", "transformers", "pandas"}
    inside = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\nimport sys\nprint(*(n for n in sys.modules if 'roadwork_dist.' in n))",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=60,
    )
    assert {name.split(".")[1] for name in inside.stdout.split()} == {"trainer", "metrics", "common"}


def test_every_test_file_is_collected(request: pytest.FixtureRequest) -> None:
    if request.config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        pytest.skip("only some of the tests were asked for")
    known = subprocess.run(["git", "ls-files", "*/test_*.py"], capture_output=True, text=True, cwd=ROOT)
    if known.returncode:
        pytest.skip("not a checkout of git")
    collected = request.config.stash[TEST_MODULES]
    missing = [name for name in known.stdout.split() if ROOT / name not in collected]
    assert not missing, f"pytest collects nothing from {missing}: see norecursedirs and python_files"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_reads_its_configs(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    # Autocast is a setting of the experiment: two places to say it would disagree.
    # Beside a file of DeepSpeed's Accelerate does not bear that it is said at all.
    assert config.mixed_precision == (None if config.distributed_type == "DEEPSPEED" else "no")
    assert not config.use_cpu


def test_make_lists_its_targets() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert {line.split()[1] for line in listed.splitlines()} == set(phony[1].split())


def test_settings_in_the_documentation_exist() -> None:
    known = set(setting_names(ExperimentConfig))
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"--([a-z_]+(?:\.[a-z_0-9]+)+)", text):
            assert name in known, f"{page.relative_to(ROOT)} names --{name}"
        for preset in re.findall(r"--config ([a-z_0-9]+)(?=\s)", text):
            assert preset in presets(), f"{page.relative_to(ROOT)} names the preset {preset}"


def test_the_example_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example
    code = example[1]
    assert "from roadwork_dist import" in code
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    digits = load_digits()
    part = Bunch(images=digits.images[:160], target=digits.target[:160])
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: part)
    code = code.replace("epochs=5", "epochs=1")
    weights = []
    for seed, start in enumerate(("first", "again")):  # as after a kill before anything was saved
        (tmp_path / start).mkdir()
        monkeypatch.chdir(tmp_path / start)
        torch.manual_seed(seed)  # a process starts with any
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(code, "README.md", "exec"), names)
        assert Path("runs/digits/metrics.jsonl").stat().st_size > 0
        weights.append(names["model"].state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
