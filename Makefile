# Everything a new checkout needs: `make train` and `make test` set up the environment themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread per process: env runners share the cores, and small operators gain nothing from more.
export OMP_NUM_THREADS ?= 1

.PHONY: setup train test test-slow check format clean help

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(READY)  ## Create .venv with the tested versions

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: setup  ## Train the controller on the embedded model, then compare it with rules and the oracle
	$(BIN)/ray-ctrl train $(ARGS)
	$(BIN)/ray-ctrl compare --samples 64 task.validation_samples=64

test: setup  ## Unit and smoke tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" $(ARGS)

test-slow: setup  ## The tests that run for minutes
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

check: setup  ## Format, lint and types, as CI runs them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup  ## Rewrite files in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment and caches; runs are kept
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis build *.egg-info
