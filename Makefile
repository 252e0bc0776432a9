# make demo | test | quick | lint, on an empty clone: each first makes .venv as it needs it.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test quick lint install clean

demo: install
	$(BIN)/phasewise demo

# A file to a process, as its tests share a checkpoint or a cluster, in the order of conftest.py.
# Two at a time: with three on two cores ranks that wait for each other run into their limits. A
# thread each, else torch's own threads wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST)

quick: install
	$(PYTEST) -m "not slow and not gpu"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

install: $(STAMP)

# torch by itself first: its CPU build satisfies what the rest asks for.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed"'
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install torch==2.13.0
	$(BIN)/pip install -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info
