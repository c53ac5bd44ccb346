# Everything runs in .venv, which the first target that needs it makes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-all lint format docs bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tophat needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/tophat demo

# What an edit needs to know: minutes on two cores.
test: $(STAMP) lint
	$(BIN)/python -m pytest -m "not slow"

# All of it: with kills, faults of the store, browsers, compiled kernels, whole clusters.
test-all: $(STAMP) lint
	sh tests/browser.sh
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# docs/recipe.md, out of the declared fields.
docs: $(STAMP)
	$(BIN)/python -m pipeline.recipe.reference > docs/recipe.md

bench: $(STAMP)
	$(BIN)/python -m benchmarks.method demo --seeds 5
	$(BIN)/python -m benchmarks.selection

clean:
	rm -rf $(VENV) runs data .mypy_cache .ruff_cache .pytest_cache
