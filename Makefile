# Every target that needs packages calls `setup`, which is instant once it has run.

PYTHON ?= python3
VENV ?= .venv
# One more than there are cores: tests wait for processes, locks and disks.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 8 ] && echo 8 || echo $$((n + 1)))
BIN = $(VENV)/bin
LOCK = $(shell $(PYTHON) -c 'import sys; print("requirements/python3.%d.txt" % min(12, sys.version_info[1]))' 2>/dev/null)
STAMP = $(VENV)/.ready-$(shell cat pyproject.toml $(LOCK) 2>/dev/null | cksum | cut -d' ' -f1)
RUN ?= runs/quickstart
# Extras of a new environment; `eval` adds lm_eval, without which `eval.harness` is left out.
EXTRAS ?= train,dev
# Python compiles what is imported, unless it was told to keep nothing; pip would compile all, for half a minute.
BYTECODE = $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)
# XLA on CPUs allocates the temporary memory of every step anew; in huge pages that is 80 faults a step less in 100.
HUGE_PAGES = GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.PHONY: help setup setup-cuda train test lint types tests quick faults lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

train: setup ## set up, then train the quickstart model on this machine's own Python sources
	$(HUGE_PAGES) $(BIN)/python -m train.main --config=configs/quickstart.py --workdir=$(RUN)

test: setup lint types tests ## set up, then lint, check types and run all tests

setup: $(STAMP) ## create .venv with pinned dependencies

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "holo-jax needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing). Use: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "'$(PYTHON)' has no venv module; install it (on Debian and Ubuntu: apt-get install python3-venv)"; exit 1; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version) (a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(BYTECODE) -c $(LOCK) -e '.[$(EXTRAS)]'
	@rm -f $(VENV)/.ready-* && touch $@

setup-cuda: setup ## add the CUDA wheels of the same versions
	$(BIN)/python -m pip install --quiet -c $(LOCK) -e '.[train,dev,cuda]'

lint: setup ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy on holo_jax and train
	$(BIN)/mypy

tests: setup ## pytest: all tests, or those that SELECT and TESTS name (SELECT='not slow' TESTS=tests/functional)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(if $(SELECT),-m '$(SELECT)') $(TESTS)

quick: setup ## every evaluation at its quick size, results checked, in runs/quick (minutes)
	$(BIN)/python -m eval.quick

faults: setup ## kill, corrupt and resume at length (N kills, default 100)
	$(BIN)/python -m tests.faults --kills=$(or $(N),100)

lock: setup ## pin what is installed now
	$(BIN)/python -m pip freeze --exclude-editable | grep -v '^holo' > $(LOCK)

clean: ## remove the environment and caches (runs/ stays)
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
