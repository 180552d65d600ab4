# On a machine with Python, git and make: `make help`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
QUIET := --disable-pip-version-check --quiet --quiet
PIP := $(BIN)/python -m pip $(QUIET)

# MLflow would send usage statistics from every run of the demo and the tests.
export MLFLOW_DISABLE_TELEMETRY = true
export DO_NOT_TRACK = 1

.DEFAULT_GOAL := help
.PHONY: help demo test suite floors lint bench bench-artifacts soak fuzz wheel clean

# For how long, and where findings and what was tried are left.
FUZZ_SECONDS ?= 1200
FUZZ_DIR ?= test-artifacts/fuzz

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The demo needs most of what the tests need, so there is one environment for all. --compile: with
# PYTHONDONTWRITEBYTECODE set, every start would otherwise compile the trackers again, which takes seconds. compileall
# does the same for memtrack itself: compiling in the agent would cost it 1.3 MiB.
$(READY): pyproject.toml
	@echo "setting up $(VENV) (one to two minutes, once) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "memtrack needs Python 3.10 or newer: make PYTHON=python3.x"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade 'pip>=25.1'
	@echo "  installing memtrack, its extras, and what the tests and the demo need ..."
	@$(PIP) install --compile --editable '.[all]' --group dev
	@$(BIN)/python -m compileall -q memtrack integrations
	@touch $@

demo: $(READY)  ## train a small model and show where its memory went
	@MPLBACKEND=Agg $(BIN)/python examples/demo.py

test:  ## every test but the slow ones, and the frameworks once more with their lowest versions
	@$(MAKE) --no-print-directory suite
	@$(MAKE) --no-print-directory floors

# Two at a time: most of them wait for servers and processes. In the order of their names, so that the short unit tests
# come last: xdist would put files with few tests there, which are the long ones.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

suite: $(READY) $(VENV)/.frameworks
	@MPLBACKEND=Agg $(BIN)/python $(PYTEST) $(PYTEST_ARGS)

$(VENV)/.frameworks: $(READY)
	@echo "  installing the frameworks that the tests train with ..."
	@$(PIP) install --compile --group test-frameworks
	@touch $@

# The lowest versions that are supported of the frameworks, some of which later Pythons have no wheels of.
FLOORS := .venv-floors
FRAMEWORKS := lightning keras huggingface accelerate pytorch

ifneq (,$(findstring Python 3.11,$(shell $(PYTHON) --version)))
floors: $(FLOORS)/.ready
	@MPLBACKEND=Agg $(FLOORS)/bin/python $(PYTEST) $(PYTEST_ARGS) \
	  $(wildcard $(FRAMEWORKS:%=tests/integrations/test_%*.py))

$(FLOORS)/.ready: pyproject.toml
	@echo "setting up $(FLOORS) (one to two minutes, once) ..."
	@test -x $(FLOORS)/bin/python || $(PYTHON) -m venv $(FLOORS)
	@$(FLOORS)/bin/python -m pip $(QUIET) install --upgrade 'pip>=25.1'
	@$(FLOORS)/bin/python -m pip $(QUIET) install --compile --editable . --group test-floors
	@$(FLOORS)/bin/python -m compileall -q memtrack integrations
	@touch $@
else
floors $(FLOORS)/.ready:
	@echo "the lowest versions of the frameworks: tested with Python 3.11 only"
endif

soak: $(READY)  ## the slow tests: long runs, outages, many workers
	@MPLBACKEND=Agg $(BIN)/python -m pytest -m slow --timeout=1800 $(PYTEST_ARGS)

fuzz: $(VENV)/.fuzz  ## broken recordings and artifacts, guided by coverage: 20 minutes each, or FUZZ_SECONDS
	@mkdir -p $(FUZZ_DIR)/tried $(FUZZ_DIR)/tried-artifacts
	@PYTHONPATH=.:integrations $(BIN)/python -m tests.fuzz.seeds $(FUZZ_DIR)/tried
	@PYTHONPATH=.:integrations $(BIN)/python -m tests.fuzz.fuzz_recording $(FUZZ_DIR)/tried tests/fuzz/corpus \
	  -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=1024 -max_len=4096 \
	  -artifact_prefix=$(FUZZ_DIR)/ -print_final_stats=1
	@PYTHONPATH=.:integrations $(BIN)/python -m tests.fuzz.crate $(FUZZ_DIR)/tried-artifacts
	@PYTHONPATH=.:integrations $(BIN)/python -m tests.fuzz.fuzz_artifacts $(FUZZ_DIR)/tried-artifacts \
	  tests/fuzz/artifacts -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=1024 -max_len=4096 \
	  -artifact_prefix=$(FUZZ_DIR)/ -print_final_stats=1

# atheris has wheels for CPython 3.11 to 3.13 on Linux only, so it is not part of `dev`.
$(VENV)/.fuzz: $(READY)
	@$(PIP) install --group fuzz
	@touch $@

lint: $(READY)  ## ruff, mypy --strict, import-linter
	@$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

bench: $(READY)  ## the figures in the README, measured here in a quarter of an hour
	@MPLBACKEND=Agg $(BIN)/python tests/benchmarks/overhead.py --rounds 1 $(BENCH_ARGS)

bench-artifacts: $(READY) $(VENV)/.bench  ## what artifacts take when they are stored, measured here in a quarter of an hour
	@$(BIN)/python tests/benchmarks/artifacts.py $(BENCH_ARGS)

$(VENV)/.bench: $(READY)
	@echo "  installing what the corpus is made with, and who else stores it ..."
	@$(PIP) install --compile --group bench
	@touch $@

wheel: $(READY)  ## build dist/*.whl
	@rm -rf dist
	@$(PIP) wheel --no-deps --wheel-dir dist .
	@ls dist

clean:  ## remove .venv and everything that runs leave behind
	@rm -rf $(VENV) $(FLOORS) build dist .memtrack test-artifacts mlruns mlartifacts mlflow.db
	@rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find memtrack integrations tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
