# make demo     the whole loop on every CUDA GPU, else on two simulated devices
# make test     lint, types, import contracts, all tests
# make chaos    the attacks at length (hours); writes docs/reliability.md
# make test-gpu what needs a GPU
# make bench    broadcast against sequence, latencies, hand-over; on GPUs all ways to move 34 GB
# make install  the system service (see docs/operations.md)

include systemd/install.mk

VENV ?= .venv
BIN := $(VENV)/bin
PIP_LOG := $(VENV)/install.log

.DEFAULT_GOAL := help
.PHONY: help demo test lint types check unit chaos test-gpu bench clean

# Compiled files as everywhere: without them each of the hundreds of processes compiles its sources.
unexport PYTHONDONTWRITEBYTECODE

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt \
	    --editable '.[daemon,test]' > $(PIP_LOG) 2>&1 || { cat $(PIP_LOG); exit 1; }
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/python -m gpuctl_demo

test: check unit

check: lint types

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/.installed
	$(BIN)/mypy

# Two at a time where seconds do not matter; one after the other where they are measured.
unit: $(VENV)/.installed
	$(BIN)/pytest -n 2 tests/unit tests/chaos
	$(BIN)/pytest --ignore tests/unit --ignore tests/chaos

chaos: $(VENV)/.installed
	$(BIN)/python -m tests.chaos all --out chaos-output
	$(BIN)/python -m tests.chaos report chaos-output/*.json

test-gpu: $(VENV)/.installed
	$(BIN)/pytest -m gpu

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/broadcast.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/handover.py
	$(BIN)/python benchmarks/shapes_speed.py
	@nvidia-smi -L > /dev/null 2>&1 || { echo "no NVIDIA GPU: weights.py and service.py are left out"; exit 0; }; \
	    $(BIN)/python benchmarks/weights.py --out bench-output --table bench-output/weights.md && \
	    $(BIN)/python benchmarks/service.py --table bench-output/service.md

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache \
	    demo-output chaos-output bench-output
