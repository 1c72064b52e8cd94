# MotionLoom: the three things a newcomer does. Each makes the environment it needs.
PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/ready
BIN    := $(VENV)/bin

# Threads that spin while they wait halve the speed of a shared machine.
export OMP_WAIT_POLICY ?= PASSIVE

DATA    ?=
MINUTES ?= 8
OUT     ?= $(if $(DATA),runs/own,runs/quickstart)
SEED    ?= 0

.PHONY: help setup quickstart test test-slow check clean

help:
	@echo "make quickstart             a text-to-video model in 15 minutes: world, cache, train, generate, page"
	@echo "make quickstart DATA=clips  the same on your own captioned clips"
	@echo "make test                   the quick tests        make test-slow   the longer proofs"
	@echo "make check                  lint, format, types, one-way imports"
	@echo "make setup                  the environment alone ($(VENV))"

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "MotionLoom needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@echo "installing MotionLoom and PyTorch into $(VENV): some minutes without a word"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(READY)

quickstart: setup
	$(BIN)/motionloom quickstart --minutes $(MINUTES) --out "$(OUT)" --seed $(SEED) $(if $(DATA),--data "$(DATA)")

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
