# Everything runs in .venv, which the first target that needs it makes from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# The newest TransformerLens, in an environment of its own: there TransformerBridge is the only hooked model.
BRIDGE_BIN := .venv-bridge/bin
BRIDGE_VERSION := 4.3.0
# Each worker imports torch and TransformerLens, about 1 GB.
WORKERS := --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: setup demo test lint bench test-bridge clean

setup: .venv/.ready

demo: setup
	$(BIN)/mechhier run demo --out results/demo

test: lint
	$(BIN)/python -m pytest $(WORKERS) tests --doctest-modules mechhier --nbmake --nbmake-timeout=900 notebooks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup
	$(BIN)/python -m benchmarks.phenomena
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.grammars
	$(BIN)/python -m benchmarks.sweeps

test-bridge: .venv-bridge/.ready
	$(BRIDGE_BIN)/python -m pytest $(WORKERS) tests/probes tests/phenomena tests/test_readme.py tests/models/test_hooked.py \
		tests/models/test_hostile_folders.py tests/models/test_loading.py tests/models/test_planted.py \
		tests/models/test_verification.py tests/models/test_wrapping.py

clean:
	rm -rf .venv .venv-bridge results

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-bridge/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bridge
	sed 's/^transformer-lens==.*/transformer-lens==$(BRIDGE_VERSION)/' constraints.txt > .venv-bridge/constraints.txt
	$(BRIDGE_BIN)/python -m pip install --quiet --constraint .venv-bridge/constraints.txt --editable '.[dev]'
	touch $@
