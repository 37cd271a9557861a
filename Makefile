# Everything sets itself up in .venv, once, with the network; afterwards nothing here needs it.
# Needed: Python 3.11 or newer (make PYTHON=python3.12 … names another) and a C compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find src -name '*.pyx' -o -name '*.pxd' -o -name '*.pxi')
BUILT := $(wildcard src/headrace/*.so src/headrace/sources/postgres/*.so)
INPUTS := pyproject.toml setup.py $(NATIVE) $(if $(word 3,$(BUILT)),,FORCE)
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
BENCH ?= end_to_end
BENCH_FLAGS ?=

.PHONY: demo test check bench clean FORCE
.NOTPARALLEL:

demo: $(VENV)/.demo ## the whole path on a real Postgres, with kills and proof: about a minute
	$(BIN)/headrace demo

test: $(VENV)/.dev ## all tests, a worker for each core; a file, with its servers, is one worker's
	$(BIN)/python -m pytest -q -n auto --dist loadfile

check: $(VENV)/.dev ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev ## one benchmark: make bench BENCH=catchup
	$(BIN)/python benchmarks/bench.py $(BENCH) --json $(BENCH_FLAGS)

clean: ## remove what the targets above made
	rm -rf $(VENV) build src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f $(NATIVE:.pyx=.c) $(BUILT)
	find src tests -name __pycache__ -prune -exec rm -rf {} +

# Without build isolation, so that a rebuild after an edit needs no network.
$(VENV)/.demo: $(VENV)/.venv $(INPUTS)
	@echo "Installing headrace with its demo (once) …"
	@$(PIP) install --no-build-isolation --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.venv $(INPUTS)
	@echo "Installing headrace with its tools for development, 200 MB of Debezium among them (once) …"
	@$(PIP) install --no-build-isolation --editable '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Headrace needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "On Debian: apt install python3-venv python3-dev gcc"; rm -rf $(VENV); exit 1; }
	@$(PIP) install --upgrade pip
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > $(VENV)/build.txt
	@$(PIP) install --requirement $(VENV)/build.txt
	@touch $@
