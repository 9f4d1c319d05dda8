# Everything below needs only Python >= 3.10 and make: the first target that needs packages sets .venv up by itself.
PYTHON ?= python3
VENV ?= .venv
# Torch goes first and alone, so that its build can be chosen: on Linux the default wheel carries CUDA.
# TORCH_INDEX is the URL of another package index to take torch from, such as PyTorch's CPU-only one.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# A person wants to see the downloads go on; a log does not.
PIP_INSTALL = $(BIN)/python -m pip install $(if $(CI),--quiet)
# More arguments for pytest, for `plutino demo` and for the benchmarks, such as PIPELINE_ARGS='--turns 12'.
PYTEST_ARGS ?=
# Processes that share the tests, a file at a time; most tests compute in one thread.
PYTEST_PROCESSES ?= 2
DEMO_ARGS ?=
PIPELINE_ARGS ?=
MEMORY_ARGS ?=
QUANTIZE_ARGS ?=

BIN := $(VENV)/bin
# Inside the environment, so that it goes with it.
STAMP := $(VENV)/.plutino-installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow chaos gpu check format bench protos clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv and install everything into it

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "plutino needs Python 3.10 or newer, $(PYTHON) is %d.%d; set PYTHON=..." % v[:2])'
	@echo "Setting up $(VENV). What is not cached yet is downloaded: torch 0.2 GB (CPU-only build) to 3 GB (Linux default,"
	@echo "with CUDA; make TORCH_INDEX=URL takes another build), Ray 0.1 GB, other packages 0.2 GB. No model is downloaded."
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) "$(TORCH)" $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)")
	$(PIP_INSTALL) -e ".[coordinator,device,dev]"
	@touch $@

demo: $(STAMP) ## fine-tune the bundled model over devices on this machine
	$(BIN)/plutino demo $(DEMO_ARGS)

test: $(STAMP) ## run the tests of every change (minutes)
	@$(BIN)/python -m pytest -n $(PYTEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

slow: $(STAMP) ## run the tests that take longer
	@$(BIN)/python -m pytest -m "slow and not gpu" --timeout=900 $(PYTEST_ARGS)

chaos: $(STAMP) ## run the tests that kill and delay processes at random
	@$(BIN)/python -m pytest -m chaos --timeout=900 $(PYTEST_ARGS)

gpu: $(STAMP) ## run the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu --timeout=300 $(PYTEST_ARGS)

check: $(STAMP) ## formatting, lint, types, layers, stale protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m protos.generate --check

format: $(STAMP) ## format, and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## measure speed against peers, memory against the plan, packed layers; writes benchmarks/results
	$(BIN)/python -m benchmarks.pipeline $(PIPELINE_ARGS)
	$(BIN)/python -m benchmarks.memory $(MEMORY_ARGS)
	$(BIN)/python -m benchmarks.quantize $(QUANTIZE_ARGS)
	$(BIN)/python -m benchmarks.weights $(WEIGHTS_ARGS)

protos: $(STAMP) ## generate the code of the .proto files anew
	$(BIN)/python -m protos.generate

clean: ## remove .venv and everything generated that git does not keep
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
