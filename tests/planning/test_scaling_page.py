"""The pages on engines and scaling: tables are the module's, examples run and print what they say."""

import doctest
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
from support.paths import ROOT

from roadwork_dist.config.io import parse_experiment
from roadwork_dist.planning.jobs import PLANS
from roadwork_dist.planning.tables import FILES, TABLES

PAGES = (ROOT / "docs" / "scaling.md", ROOT / "docs" / "how-to" / "engines.md")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_table_is_whole(name: str) -> None:
    lines = TABLES[name]().splitlines()
    assert len(lines) > 4
    assert len({line.count("|") for line in lines}) == 1
    assert "nan" not in TABLES[name]()


def test_every_table_is_on_a_page(hooks: ModuleType) -> None:
    text = "".join(path.read_text() for path in PAGES)
    assert set(re.findall(r"<!-- planning: (\w+) -->", text)) == set(TABLES)
    filled = hooks.on_page_markdown("a\n\n<!-- planning: links -->\n\nb", None, None, None)
    assert filled == f"a\n\n{TABLES['links']()}\n\nb"
    with pytest.raises(KeyError, match="no_such_table"):
        hooks.on_page_markdown("<!-- planning: no_such_table -->", None, None, None)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_examples_print_what_the_page_says(path: Path) -> None:
    text = "\n".join(re.findall(r"```pycon\n(.*?)```", path.read_text(), re.DOTALL))
    test = doctest.DocTestParser().get_doctest(text, {}, path.name, str(path), 0)
    assert test.examples
    runner = doctest.DocTestRunner(verbose=False)
    failed = runner.run(test, out=sys.stderr.write).failed
    assert not failed


@pytest.mark.parametrize("name", [name for name, plan in PLANS.items() if plan.settings])
def test_commands_are_settings_that_exist(name: str) -> None:
    plan = PLANS[name]
    config = parse_experiment(["--config", "natix_8gpu", *(plan.settings or "").split()])
    assert (config.batch_size, config.accumulation) == (plan.batch_size, plan.accumulation)
    assert (config.features.mode == "online") == (plan.job.frozen > 0 or name == "full")


def test_commands_name_files_that_are_there() -> None:
    for file in FILES.values():
        assert (ROOT / "accelerate_configs" / f"{file}.yaml").is_file(), file
