# Every target creates .venv where it is missing and installs what the target needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN_DIR ?= runs/quickstart
# For real-small: MODEL is a folder or a hub name; DATA is a folder to read in place of the hub.
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
DATA ?=
REAL_DIR ?= runs/real-small
# Number of test processes. Each uses one thread, so that tests with several ranks do not oversubscribe the cores.
WORKERS ?= 2
PYTEST_ARGS ?=

PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help quickstart real-small test test-all lint audit format docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1	/'

quickstart: $(VENV)/.installed-report  ## the whole chain on a small model on a CPU, then its report
	$(BIN)/rpo-trainer run recipes/quickstart/chain.yaml --run-dir $(RUN_DIR)

real-small: $(VENV)/.installed-report,verifiers  ## the chain on SmolLM2-135M (MODEL=, DATA=), adapters, on a CPU, and its table
	$(BIN)/python recipes/real/prepare.py $(if $(DATA),--local $(DATA))
	$(BIN)/rpo-trainer run recipes/real/small.yaml --run-dir $(REAL_DIR) \
		model.name_or_path=$(if $(wildcard $(MODEL)),$(abspath $(MODEL)),$(MODEL))
	$(BIN)/python recipes/real/measure.py $(REAL_DIR) --rows 32 --max-new-tokens 96 --batch-size 32 \
		--stages model,general-sft,dpo,rpo-instructions

test: $(VENV)/.installed-test  ## the tests without the slow ones, minutes on two cores
	$(PYTEST) -m "not slow and not long" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test-all  ## every test, with DeepSpeed, bitsandbytes, lm-eval, and a browser
	$(PYTEST) $(PYTEST_ARGS)

lint: $(VENV)/.installed-lint  ## formatting, lint, types, and import direction; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: $(VENV)/.installed-audit  ## check the installed packages for known vulnerabilities
	$(BIN)/python .ci/audit.py

format: $(VENV)/.installed-lint  ## format, and apply the fixes of ruff
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-docs  ## build the documentation site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove .venv, caches, and builds; keeps runs/
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is missing or older than 3.10; name another: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# One stamp per extra; pip runs again when the project file or the pins change.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e '.[$*]'
	@touch $@
