# make install: environment.   make demo: environment, then a real model at 3.6 bits in four ways.
# make test: environment, then the whole test suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test lint format clean

demo: $(VENV)/.runtime
	$(BIN)/lqer sweep demo configs/demo.toml three-bits

install: $(VENV)/.runtime

# Two processes of one thread each: the models are too small to gain from more, and bars would drown a failure.
test: $(VENV)/.dev
	$(MAKE) lint
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check lqer experiments tests
	$(BIN)/ruff format --check lqer experiments tests
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix lqer experiments tests
	$(BIN)/ruff format lqer experiments tests

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("lqer needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# A stamp is touched once its requirements are installed, and is older than them when they change.
$(VENV)/.runtime: requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -r requirements.txt
	$(BIN)/python -m pip install -q --no-deps -e .
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
