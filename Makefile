# make demo     the whole loop on every CUDA GPU, else on two simulated devices
# make test     lint, types, import contracts, all tests
# make test-gpu what needs a GPU
# make bench    broadcast against sequence, latencies, speed of the demo's model
# make install  the system service (see docs/operations.md)

include systemd/install.mk

VENV ?= .venv
BIN := $(VENV)/bin
PIP_LOG := $(VENV)/install.log

.DEFAULT_GOAL := help
.PHONY: help demo test lint types check unit test-gpu bench clean

help:
	@sed -n 's/^# //p' Makefile

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
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

unit: $(VENV)/.installed
	$(BIN)/pytest

test-gpu: $(VENV)/.installed
	$(BIN)/pytest -m gpu

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/broadcast.py
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/handover.py
	$(BIN)/python benchmarks/shapes_speed.py

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache demo-output
