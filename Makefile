# `make demo` and `make test` set up all they need; everything lands in .venv inside the tree.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes
DRIVER ?= process
IMAGE ?= cortex-sandbox:latest
BASE ?= debian:bookworm-slim
AGENTS ?= claude codex gemini opencode
BENCH ?= relay bringup

.PHONY: help demo test check format image bench-peers bench lock clean

help: ## Shows the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: $(VENV)/.runtime ## One session with the built-in agent; PROMPT='…' for one turn, DRIVER=docker for a container.
	@$(BIN)/cortex demo --driver $(DRIVER) $(if $(PROMPT),--prompt "$$PROMPT")
export PROMPT

test: $(VENV)/.dev ## Runs every test that this machine can run (Docker tests where Docker answers).
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests/unit tests/integration
	$(BIN)/python -m pytest -q tests/e2e

check: $(VENV)/.dev ## Lints, types, import contracts, and the sample configuration.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/cortex config check config.toml

format: $(VENV)/.dev ## Formats the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

image: ## Builds the sandbox image with AGENTS="claude codex gemini opencode" ("" for the demo agent alone).
	docker build --build-arg BASE=$(BASE) --build-arg AGENTS="$(AGENTS)" -f Dockerfile.sandbox -t $(IMAGE) .

bench-peers: $(VENV)/.dev ## Installs what the benchmarks compare with.
	bench/peers/install

bench: $(VENV)/.dev ## Runs the benchmarks; BENCH="relay" for one of them.
	@for name in $(BENCH); do $(BIN)/cortex bench $$name || failed=1; done; exit $${failed:-0}

lock: $(VENV)/.dev ## Pins the newest versions that the project allows, with hashes.
	scripts/lock

clean: ## Removes the virtual environment and caches.
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	@PYTHON="$(PYTHON)" scripts/venv $(VENV)

$(VENV)/.runtime: requirements.txt requirements-build.txt pyproject.toml | $(VENV)/bin/python
	$(PIP) -r requirements-build.txt -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m compileall -q broker sandbox_agent
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(PIP) -r requirements-dev.txt
	@touch $@
