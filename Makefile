# Targets make .venv once and use it. On a machine without a GPU a lighter torch will do, for example
#     make test TORCH_FLAGS="--index-url URL-OF-CPU-BUILDS"

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help venv style format check test test-all test-newest test-deepspeed test-megatron-lm trees gpu-check demo \
    results-quick chaos docs clean

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(if $(shell command -v $(name)),$(name))))
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=
EXTRAS ?= dev,docs,report,deepspeed,huggingface
PYTEST_ARGS ?=
# Files that are tested at a time; many tests start several ranks. 0 runs them one after the other, in pytest's own process.
WORKERS ?= 2
TESTS ?=

# The newest megatron-core needs Python 3.12; the first one that starts is taken (pyenv has it without offering it).
PYENV := $(or $(shell pyenv root 2>/dev/null),$(HOME)/.pyenv)
NEWEST_PYTHON ?= $(firstword $(foreach name,python3.12 $(wildcard $(PYENV)/versions/3.12*/bin/python3.12),\
    $(if $(shell $(name) -c 'import ensurepip, venv; print(1)' 2>/dev/null),$(name))))

VENV := .venv
BIN := $(VENV)/bin
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Ranks are processes: with more threads each they only get in each other's way. deepspeed shall not compile or guess.
export OMP_NUM_THREADS := 1
export DS_ACCELERATOR ?= cpu
export DS_BUILD_OPS ?= 0

# mkdocs-material speaks of a version of mkdocs that is kept out here.
export NO_MKDOCS_2_WARNING := 1

help:
	@echo "make venv | style | format | check | test | test-all | test-newest | test-deepspeed | test-megatron-lm | gpu-check |"
	@echo "     demo | results-quick | chaos MINUTES=60 | docs | clean"

venv: $(STAMP)

# torch first: its build (CPU, CUDA) is the user's choice, and what follows must find it there.
$(STAMP): setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH_FLAGS) "$(TORCH)"
	$(PIP) install --quiet "setuptools>=77" wheel
	$(PIP) install --quiet --editable ".[$(EXTRAS)]"
	touch $@

style: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: style
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow" $(TESTS) $(PYTEST_ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The same on the newest megatron-core, in an environment of its own. Without Python 3.12 it says so and passes;
# ES_REQUIRE_NEWEST=1 makes it fail. Remove .venv-newest to move to a newer megatron-core.
test-newest:
ifeq ($(NEWEST_PYTHON),)
	@echo "skipped: test-newest needs Python 3.12, and there is no \`python3.12\` that starts (NEWEST_PYTHON=PATH names one)"
	@test "$(ES_REQUIRE_NEWEST)" != 1
else
	$(MAKE) test VENV=.venv-newest PYTHON="$(NEWEST_PYTHON)" \
	    TESTS="tests/unit tests/ranks tests/contract"
endif

test-deepspeed: $(STAMP)
	$(BIN)/python -m pytest -k deepspeed $(PYTEST_ARGS)

# MEGATRON_LM is a checkout of Megatron-LM, MEGATRON_DEEPSPEED one of Megatron-DeepSpeed, unmodified; without them the tests skip.
# A checkout that asks for Python 3.12 is run in the environment of test-newest.
test-megatron-lm:
ifneq ($(shell grep -s '^requires-python.*>= *3\.1[2-9]' "$(MEGATRON_LM)/pyproject.toml"),)
	@test -n "$(NEWEST_PYTHON)" || { echo "$(MEGATRON_LM) needs Python 3.12 (NEWEST_PYTHON=PATH names one)"; exit 1; }
	$(MAKE) trees VENV=.venv-newest PYTHON="$(NEWEST_PYTHON)"
else
	$(MAKE) trees
endif

trees: $(STAMP)
	$(PIP) install --quiet six regex einops pydantic pybind11
	MEGATRON_LM="$(abspath $(MEGATRON_LM))" MEGATRON_DEEPSPEED="$(abspath $(MEGATRON_DEEPSPEED))" $(BIN)/python -m pytest \
	    tests/end_to_end/test_megatron_lm.py tests/end_to_end/test_megatron_lm_merged.py \
	    tests/end_to_end/test_megatron_deepspeed.py tests/end_to_end/test_example_scripts.py $(PYTEST_ARGS)

# Nobody has run it on a GPU yet. Without a CUDA device it writes what it would do, and passes.
gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_check $(GPU_CHECK_ARGS)

demo: $(STAMP)
	$(BIN)/es-megatron demo

results-quick: $(STAMP)
	$(BIN)/es-megatron compare benchmarks/quality/tuning.yaml --cases clean damaged --seeds 1 2 3 \
	    --arms uniform plain history excess band static

# Faults of all kinds for so many minutes, and a table; goes on where it stopped, in runs/chaos. Needs a C compiler.
MINUTES ?= 60
chaos: $(STAMP)
	$(BIN)/python -m tests.faults.chaos --minutes $(MINUTES) $(CHAOS_ARGS)

# The documentation as a site, into site/; any warning is an error.
docs: $(STAMP)
	$(BIN)/python -m mkdocs build --quiet --strict

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
