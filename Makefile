# `make demo` and `make test` need only python3 (3.11 or newer) and make: each
# target builds the environment that it needs, from the pins in constraints.txt.

PYTHON ?= python3
PYTEST_WORKERS ?= 2
OUTPUT ?= results/digits
DEVICE ?= cpu

VENV := .venv
BENCH_VENV := .venv-bench
BIN := $(VENV)/bin

# Shapes and types of every call inside funcbayes are checked while the tests run.
TYPE_CHECKS := --jaxtyping-packages=funcbayes,typechecker.typechecker
PARALLEL := -n $(PYTEST_WORKERS) --dist worksteal
# pytest exits with 5 where no test is selected.
OR_NONE := || [ $$? -eq 5 ]

# The version of pyright is the one in constraints.txt, in hooks and CI alike;
# without this it asks the network on every run whether there is a newer one.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# A notice about other site generators, in colour, on every build.
export NO_MKDOCS_2_WARNING := 1

# Test workers share the cores: waiting threads should sleep, not spin.
test-fast test-slow test-peers: export OMP_WAIT_POLICY := passive

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-fast test-compile test-examples test-slow test-peers bench bench-full docs lint ruff pyright format clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

demo: $(VENV)/.stamp  ## compare the methods on the digits data (OUTPUT=folder)
	$(BIN)/funcbayes compare --data digits --output $(OUTPUT)
	@echo "The tables and pictures are in $(OUTPUT)/"

test: lint test-fast test-compile test-examples docs  ## what CI runs: lint, types, tests, examples, docs

test-fast: $(VENV)/.stamp
	$(BIN)/pytest $(TYPE_CHECKS) $(PARALLEL) -m "not slow and not compile" $(OR_NONE)

test-compile: $(VENV)/.stamp
	$(BIN)/pytest -m "compile and not slow" $(OR_NONE)

test-examples: $(VENV)/.stamp
	$(BIN)/pytest --doctest-modules funcbayes README.md $(wildcard docs) $(OR_NONE)

# Strict: a broken link or a name that is not documented fails it.
docs: $(VENV)/.stamp  ## build the documentation into site/
	$(BIN)/mkdocs build --quiet --strict

test-slow: export FUNCBAYES_HYPOTHESIS_PROFILE := slow
test-slow: $(VENV)/.stamp  ## the slow tests, with more hypothesis examples
	$(BIN)/pytest $(TYPE_CHECKS) $(PARALLEL) -m "slow and not compile" $(OR_NONE)
	$(BIN)/pytest -m "slow and compile" $(OR_NONE)

# Where a peer is missing the tests fail; `make test` skips them.
test-peers: export FUNCBAYES_REQUIRE_PEERS := 1
test-peers: $(BENCH_VENV)/.stamp-tests  ## agreement with other libraries
	$(BENCH_VENV)/bin/python -m pytest tests/peers

bench: $(BENCH_VENV)/.stamp  ## time funcbayes against plain loops and other libraries (DEVICE=cuda)
	$(BENCH_VENV)/bin/python -m benchmarks --device $(DEVICE)

bench-full: $(BENCH_VENV)/.stamp  ## the same, with more cells and how time grows with sizes
	$(BENCH_VENV)/bin/python -m benchmarks --full --device $(DEVICE)

lint: ruff pyright  ## ruff and pyright

ruff: $(VENV)/.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check

pyright: $(VENV)/.stamp
	$(BIN)/pyright --warnings

format: $(VENV)/.stamp  ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove all that the other targets made, the environments too
	rm -rf $(VENV) $(BENCH_VENV) results build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

define require_python
@command -v $(PYTHON) >/dev/null || { \
	echo "funcbayes needs Python 3.11 or newer, but $(PYTHON) was not found: install it, or name one by 'make PYTHON=/path/to/python3'" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "funcbayes needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1): name a newer one by 'make PYTHON=/path/to/python3'" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "$(PYTHON) has no venv or ensurepip module: install it (on Debian and Ubuntu the package python3-venv)" >&2; exit 1; }
endef

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(require_python)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(BENCH_VENV)/.stamp: pyproject.toml constraints.txt benchmarks/peers.txt
	$(require_python)
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[report]'
	$(BENCH_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps --requirement benchmarks/peers.txt
	$(BENCH_VENV)/bin/python -W ignore -c 'import asdl, backpack, curvlinops, incerto, laplace, posteriors'
	@touch $@

# What pytest needs to load conftest.py comes after the peers, so that `make bench` does without.
$(BENCH_VENV)/.stamp-tests: $(BENCH_VENV)/.stamp
	$(BENCH_VENV)/bin/python -m pip install --quiet --constraint constraints.txt 'pytest>=9' 'sybil[pytest]' hypothesis
	@touch $@
