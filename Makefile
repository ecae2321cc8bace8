# make quickstart   set up, train the embedded default, score it        make test   set up and run the tests
# make perf         benchmarks of the operations, tables in perf/       make gpu-check   tests and benchmarks on a GPU
# make chaos        kill, stall and starve real runs, table in docs/reliability.md
PYTHON ?= python3
NPROC ?= 2
BIN = .venv/bin
TESTS = -m "not thorough"

.PHONY: quickstart test test-thorough lint setup perf chaos gpu-check
setup: .venv/ready

.venv/ready: requirements/cpu.txt requirements/cuda.txt requirements/rollout-cpu.txt pyproject.toml setup.py requirements/install.sh $(wildcard csrc/*)
	PYTHON="$(PYTHON)" sh requirements/install.sh

quickstart: setup
	@NPROC=$(NPROC) $(BIN)/python examples/quickstart.py

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder --durations=15 $(TESTS) tests

# All of the tests, the marked ones included.
test-thorough:
	$(MAKE) test TESTS=

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

perf: setup
	$(BIN)/python -m pytest -q -p no:cacheprovider perf/bench_*.py
	$(BIN)/python perf/table.py

chaos: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos/chaos.py

# Needs no network and no `make setup`: without a .venv it takes $(PYTHON) and what that has.
gpu-check:
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) perf/gpu_check.py $(if $(PARTS),--parts $(PARTS)) $(if $(OUTPUT),--output $(OUTPUT))
