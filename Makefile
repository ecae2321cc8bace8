# make quickstart   set up, train the embedded default, score it        make test   set up and run the tests
PYTHON ?= python3
NPROC ?= 2
BIN = .venv/bin

.PHONY: quickstart test lint setup
setup: .venv/ready

.venv/ready: requirements/cpu.txt requirements/cuda.txt requirements/rollout-cpu.txt pyproject.toml setup.py requirements/install.sh
	PYTHON="$(PYTHON)" sh requirements/install.sh

quickstart: setup
	@NPROC=$(NPROC) $(BIN)/python examples/quickstart.py

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --durations=15 tests

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
