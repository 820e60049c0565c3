# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0
# Empty is unset: where it is set, each of the hundreds of processes that the tests start compiles every module again.
export PYTHONDONTWRITEBYTECODE :=

# One more than there are cores, up to four: tests wait for servers and clusters as often as they compute.
TEST_PROCESSES ?= $(shell cores=$$(nproc); echo $$((cores < 3 ? cores + 1 : 4)))

.DEFAULT_GOAL := help
.PHONY: help demo test lint types bench bench-peers bench-s3 bench-quantised bench-adapters bench-scale makespans profile test-slow test-scale test-races test-ceph test-cluster chaos fuzz clean image-test cluster-demo test-peers test-browser test-install test-pythons bench-prediction

help:
	@echo "make demo        train, merge, verify and compare small models, here (two minutes; installs torch and Ray first)"
	@echo "make test        the test suite (five minutes on two cores, no network, no GPU)"
	@echo "make lint types  ruff and mypy"
	@echo "make test-slow   more of what make test shows: all combinations of methods, dtypes, layouts; a processor with SSE2 alone, secrets on Ray, more workers, whole benchmarks"
	@echo "make test-scale  large tensors and the planning of 92,000 names"
	@echo "make test-races  two drivers at once, twenty times each, and every way to be interrupted"
	@echo "make chaos       a hundred random kills, storms of faults, full disks (ARGS='--seed 7' replays; root for the disks)"
	@echo "make test-cluster  ray job submit, several nodes, a node drained"
	@echo "make cluster-demo  a Ray cluster of three nodes, a merge from S3 to S3, a node killed: told step by step"
	@echo "make test-browser  the report's page in a headless chromium (Debian's, or one of playwright's)"
	@echo "make test-install  a wheel in empty environments, without constraints, by today's pip and the oldest (package index)"
	@echo "make test-pythons  merges, and the tests that need no torch, on Python 3.12 and 3.13 (package index)"
	@echo "make image-test  build the container image and merge in it (root, buildah, debootstrap)"
	@echo "make test-ceph   the storage contract on Ceph's gateway (Debian's packages)"
	@echo "make bench       time and memory of merges against the I/O floor; docs/benchmarks.md"
	@echo "make bench-peers the same merge by mergekit, in an environment of its own"
	@echo "make test-peers  merges against those of mergekit and PEFT, in environments of their own"
	@echo "make fuzz        malformed inputs for every reader, guided by coverage (8 minutes)"
	@echo "make bench-s3    time and CPU of a merge from S3 to S3 against moving the same bytes (Ceph)"
	@echo "make bench-quantised  CPU per element of FP8, INT4 and MXFP4 beside BF16 of equal shapes"
	@echo "make bench-adapters  Model Stock of three adapters beside that of the checkpoints they make (Ceph)"
	@echo "make bench-prediction  what stockflow plan predicts against what merges take; docs/insight.md#how-well-it-predicts"
	@echo "make bench-scale how well 1 to 16 Ray workers share a merge, each one's rate capped (25 minutes)"
	@echo "make makespans   simulated merges of 10**12 parameters on 8 to 512 workers"
	@echo "make profile     where the time of a merge goes, by stage"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[torch]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/stockflow demo

# Files in the order of their names, so that the many quick ones of unit tests come last and no process waits for a long one.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow $(ARGS)

test-scale: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m scale $(ARGS)

test-races: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m races $(ARGS)

test-ceph: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m ceph $(ARGS)

$(VENV)/.installed-fuzz: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	@touch $@

chaos: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m chaos $(ARGS)

fuzz: $(VENV)/.installed-fuzz
	$(BIN)/python -m pytest -m fuzz -rP $(ARGS)

test-peers: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m peers $(ARGS)

$(VENV)/.installed-browser: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[browser]'
	@touch $@

test-install: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m install -rPs $(ARGS)

test-pythons: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m pythons -rPs $(ARGS)

test-browser: $(VENV)/.installed-browser
	$(BIN)/python -m pytest -m browser -rs $(ARGS)

test-cluster: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m cluster $(ARGS)

image-test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m image -rs $(ARGS)

cluster-demo: $(VENV)/.installed-dev
	$(BIN)/python -m tests.cluster_demo

bench: $(VENV)/.installed-dev
	$(BIN)/python -m tests.benchmarks.local_merge $(ARGS)

bench-peers: $(VENV)/.installed-dev
	$(BIN)/python -m tests.benchmarks.peers $(ARGS)

bench-s3: $(VENV)/.installed-dev
	$(BIN)/python -m tests.benchmarks.s3_merge $(ARGS)

bench-prediction: $(VENV)/.installed-dev
	$(BIN)/python -m tests.benchmarks.prediction $(ARGS)

bench-quantised: $(VENV)/.installed-dev
	$(BIN)/python -m tests.benchmarks.quantised $(ARGS)

bench-adapters: $(VENV)/.installed-dev
	$(BIN)/python -m tests.benchmarks.adapters $(ARGS)

bench-scale: $(VENV)/.installed-dev
	for workers in 16 8 4 2 1; do $(BIN)/python -m tests.benchmarks.scale_out --workers $$workers $(ARGS) || exit; done

makespans: $(VENV)/.installed-dev
	$(BIN)/python -m tests.benchmarks.makespans $(ARGS)

profile: $(VENV)/.installed-dev
	$(BIN)/python -m tests.benchmarks.stages $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
