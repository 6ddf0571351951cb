# `make` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-real test test-fp8 lint format types docs check install install-dev constraints clean

PYTHON ?= python3
ARGS ?=
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# One core decodes photos (the demo's loader process). More threads than free cores wait for each other:
# twice the threads were five times slower here.
THREADS ?= $(shell echo $$(( $(CORES) > 1 ? $(CORES) - 1 : 1 )))
# Test processes: each imports torch, so a big machine does not get one per core.
JOBS ?= $(shell echo $$(( $(CORES) < 8 ? $(CORES) : 8 )))

# glibc returns large buffers to the system at once and then faults their pages in again: that was 40 % of the
# time of computing features.
MALLOC := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_TOP_PAD_=67108864

# Tests start hundreds of processes; without cached bytecode each of them compiles the libraries again.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
UV_INSTALL = $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt
# Stamp files of the last finished install; a change of the declared dependencies makes them out of date.
PLAIN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
DECLARED := setup.cfg pyproject.toml constraints.txt

help: ## list these targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

demo: demo-data/synthetic.json ## train the demo on synthetic photos and write its report
	$(MALLOC) $(BIN)/accelerate launch --quiet --config_file accelerate_configs/single_gpu.yaml \
		--num_cpu_threads_per_process $(THREADS) launch/pretrain.py $(ARGS)

# The file that is written last; an interrupted set is completed.
demo-data/synthetic.json: | $(PLAIN)
	$(BIN)/roadwork-dist synth demo-data

demo-real: $(PLAIN) ## train on real photographs (needs Debian's tuxpaint-stamps-default)
	@test -d /usr/share/tuxpaint/stamps || { \
		echo "make demo-real: no photographs in /usr/share/tuxpaint/stamps." >&2; \
		echo "Install them (161 MB, GPL-2): sudo apt-get install tuxpaint-stamps-default" >&2; exit 1; }
	$(BIN)/roadwork-dist demo-real $(ARGS)

test: $(DEV) ## run the tests; ARGS="tests/photos -k view" runs some
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

# Not among the development extras: transformers imports torchao if it is installed, which adds two seconds to
# every test that loads one of its networks.
test-fp8: $(DEV) ## install torchao and run the tests of fp8 training
	$(UV_INSTALL) --editable '.[dev,fp8]'
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/trainer/engine/test_fp8.py
	$(BIN)/uv pip uninstall --quiet --python $(BIN)/python torchao

lint: $(DEV) ## style and the direction of imports: seconds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(DEV) ## rewrite files in the repository's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV) ## mypy --strict
	$(BIN)/mypy

docs: $(DEV) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint types docs ## all checks of CI except tests
	@if command -v shellcheck >/dev/null; then shellcheck -x .ci/run launch/*.slurm launch/lib.sh && echo "shellcheck: fine"; else \
		echo "shellcheck is not installed, so scripts were not checked: sudo apt-get install shellcheck"; fi

install: $(PLAIN) ## create .venv and install the package
install-dev: $(DEV) ## create .venv and install the package with its development extras

# uv installs about ten times faster than pip; pip installs uv, in the version pinned by constraints.txt.
$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and '$(PYTHON)' is older: choose another one," >&2; \
		echo "for example: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
		echo "'$(PYTHON) -m venv' failed. On Debian: sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV): a first install downloads about 3 GB (torch with CUDA) and takes minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv

$(PLAIN): $(DECLARED) | $(BIN)/uv
	$(UV_INSTALL) --editable .
	@touch $@

$(DEV): $(DECLARED) | $(BIN)/uv
	$(UV_INSTALL) --editable '.[dev]'
	@touch $@ $(PLAIN)

constraints: | $(BIN)/uv ## resolve constraints.txt again, to the newest releases
	$(BIN)/uv pip compile setup.cfg --all-extras --universal --python-version 3.11 --upgrade --quiet \
		--custom-compile-command 'make constraints' --output-file constraints.txt

clean: ## delete files of builds and tests; keeps .venv, data and runs
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
