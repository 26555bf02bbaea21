# Everything a newcomer, a contributor and CI need. `make` alone lists the targets.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Two workers, one thread each: tests of tiny models lose time to more threads.
WORKERS ?= 2
PYTEST  := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=offline \
           $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help env demo test test-full lint format lock wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

env: $(STAMP) ## create .venv from requirements.lock (PYTHON=python3.12 chooses the interpreter)

# deepspeed is a source distribution whose build imports torch, so it comes last and builds in this environment.
# DS_BUILD_OPS=0: no kernels are compiled here; deepspeed compiles those that it needs on first use.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: $(PYTHON) is missing or older than 3.11; say which to use: make env PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $$(grep -E '^(setuptools|wheel|packaging|ninja|hatchling|editables)==' requirements.lock)
	grep -v '^deepspeed==' requirements.lock > $(VENV)/.lock-without-deepspeed
	$(BIN)/python -m pip install --quiet --no-build-isolation -r $(VENV)/.lock-without-deepspeed
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

# Passive: threads that wait for each other sleep. Spinning ones made training ten times slower on busy cores.
demo: $(STAMP) ## the model in the box learns a style: before, during and after in one picture (minutes, no GPU)
	OMP_WAIT_POLICY=passive $(BIN)/python -m finetune.demo

test: lint ## everything CI runs: lint, types, and the tests that are not slow
	$(PYTEST) -m "not slow"

test-full: lint ## every test, with the long matrices and fresh random examples
	HYPOTHESIS_PROFILE=searching $(PYTEST)

lint: $(STAMP) ## ruff (its formatter too) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## ruff's formatter and its safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(STAMP) ## write requirements.lock from what is installed in .venv
	@{ sed -n '/^#/p' requirements.lock; \
	   $(BIN)/python -m pip list --format=freeze --exclude-editable --exclude pip --exclude ldm-finetune \
	     | sed 's/+[a-z0-9.]*$$//'; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock
	@grep -c == requirements.lock | sed 's/$$/ packages pinned in requirements.lock/'

wheel: $(STAMP) ## build dist/*.whl
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove what builds and tests left (not .venv, not runs/)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
