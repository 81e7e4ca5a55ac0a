# make setup, demo, demo-long, test, chaos, lint, bench, clean. Every target that needs the environment makes it first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.isthmus-installed

# uv reads no wheel folder from pip's configuration; hand it the one that pip was told of, if any.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-long test test-all chaos lint format bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP) ## make .venv and install the tested versions

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Isthmus needs Python 3.11 or newer, this is %s. Try: make setup PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

# uv installs in seconds what takes pip minutes; without it pip does the same.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@$(BIN)/python -m pip install -q uv || echo "uv cannot be had here; pip goes on alone"
	@if $(BIN)/python -m uv --version >/dev/null 2>&1; then \
		$(BIN)/python -m uv pip install -q -p $(BIN)/python -e '.[dev,bench]' -c constraints.txt; \
	else \
		$(BIN)/python -m pip install -q -e '.[dev,bench]' -c constraints.txt; \
	fi
	@touch $@

demo: setup ## the whole thread on real images, about eight minutes on two cores
	$(BIN)/isthmus demo

demo-long: setup ## the same with longer training
	$(BIN)/isthmus demo --long

# Starting Ray is mostly waiting, so two processes share the tests; a cluster's tests stay together in one of them.
SPREAD := -n 2 --dist loadgroup --no-loadscope-reorder

test: setup ## the tests
	$(BIN)/pytest $(SPREAD)

test-all: setup ## the tests and the long proofs
	$(BIN)/pytest $(SPREAD) -m 'not gpu'

chaos: setup ## every fault in training and captioning, on real clusters; runs/chaos/report.json
	$(BIN)/pytest -m chaos tests/ray/chaos --chaos-report runs/chaos/report.json

lint: setup ## style, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## the side-by-side measurements
	@for script in $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean: ## remove caches and builds; .venv, data/ and runs/ stay
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis platform/*.egg-info
	find platform tests jobs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
