# `make demo` and `make test` are all that a fresh machine needs; both create .venv and install.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(BIN)/btm: pyproject.toml $(wildcard $(CONSTRAINTS))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[$(EXTRAS)]'
	touch $@

install: $(BIN)/btm ## create .venv and install; CONSTRAINTS= takes the newest releases (CUDA torch)

demo: $(BIN)/btm ## the main job: a forest on text that is already here, with report
	$(BIN)/btm demo

test: checks ## style, types, import contracts and all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow and not gpu" tests

checks: $(BIN)/btm ## ruff, pyright, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

test-gpu: $(BIN)/btm ## tests that need CUDA
	$(BIN)/python -m pytest -m gpu tests

kill-test: $(BIN)/btm ## SIGKILL everything at random moments; the result must not change
	$(BIN)/python -m pytest -m slow -s tests/kill

lm-eval: $(BIN)/btm ## lm-evaluation-harness on a merged model and on an ensemble
	$(BIN)/pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[dev,eval]'
	$(BIN)/python -m pytest -m slow -s tests/lm_eval

bench: $(BIN)/btm ## ratios to named peers, measured in one run each
	set -e; for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file; done

format: $(BIN)/btm ## format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and outputs
	rm -rf outputs wandb .pytest_cache .ruff_cache .hypothesis build dist *.egg-info

.PHONY: help install demo test checks test-gpu kill-test lm-eval bench format clean
