# `make demo` and `make test` are all that a fresh machine needs; both create .venv and install.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
TEST_WORKERS ?= 2
INSTALL = $(BIN)/pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

# pip comes last into a new environment: without it, an earlier attempt was interrupted.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: `make demo` installs what the package needs, the other targets add to it.
$(VENV)/installed-%: pyproject.toml $(wildcard $(CONSTRAINTS)) | $(BIN)/pip
	$(INSTALL) '.$(if $(filter-out base,$*),[$*])'
	touch $(VENV)/installed-base $@

install: $(VENV)/installed-dev ## create .venv and install; CONSTRAINTS= takes the newest releases (CUDA torch)

demo: $(VENV)/installed-base ## the main job: a forest on text that is already here, with report
	$(BIN)/btm demo

test: checks ## style, types, import contracts and all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(TEST_WORKERS) --dist loadfile tests

checks: $(VENV)/installed-dev ## ruff, pyright, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

test-slow: $(VENV)/installed-dev ## tests of more than ten seconds that need nothing special
	$(BIN)/python -m pytest -m "slow and not gpu" --ignore tests/kill --ignore tests/lm_eval --ignore tests/slurm tests

test-gpu: $(VENV)/installed-dev ## tests that need CUDA
	$(BIN)/python -m pytest -m gpu tests

test-slurm: $(VENV)/installed-dev $(VENV)/installed-sweep ## a real Slurm on this machine (root, Debian): all that slurm/README.md promises; about 25 minutes
	apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge iproute2 util-linux shellcheck
	$(BIN)/python -m pytest -m "slow or not slow" tests/slurm

kill-test: $(VENV)/installed-dev ## SIGKILL everything at random moments; the result must not change
	$(BIN)/python -m pytest -m slow -s tests/kill

lm-eval: $(VENV)/installed-dev $(VENV)/installed-eval ## lm-evaluation-harness on a merged model, an ELM and an ensemble
	$(BIN)/python -m pytest -m slow -s tests/lm_eval

bench: $(VENV)/installed-bench ## ratios to named peers, measured in one run each; about 25 minutes, or BENCH='routing merge'
	$(BIN)/python tests/benchmarks/run_all.py $(BENCH)

mixed-modal: $(VENV)/installed-dev ## dense, modality-split and modality-aware models on PICTURES=<folder with captions.jsonl>
	$(BIN)/python tests/benchmarks/mixed_modal.py $(PICTURES)

format: $(VENV)/installed-dev ## format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and outputs
	rm -rf outputs wandb .pytest_cache .ruff_cache .hypothesis build dist *.egg-info

.PHONY: help install demo test checks test-slow test-gpu test-slurm kill-test lm-eval bench mixed-modal format clean
