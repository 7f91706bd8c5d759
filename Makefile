# make help lists the targets. Everything installs itself into .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Models and data are never fetched by tests or demo: a hub that is out of reach must not matter.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# One thread a process: small matrices gain nothing from more, and two processes of two threads wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# Of make chaos and make fuzz.
KILLS ?= 100
MINUTES ?= 10
SEED ?= 0

.DEFAULT_GOAL := help
.PHONY: help install demo train test test-fast gpu newest fuzz chaos check format wheel clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(INSTALLED) ## virtual environment in .venv with the pinned versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# torch first: with it in place nothing else pulls another build of it
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,deepspeed]'
	touch $@

demo: $(INSTALLED) ## synthetic heads -> tokens -> corpus -> two trainings -> avatars that move -> bench, in outputs/demo (seven minutes, CPU)
	$(BIN)/python -m training.recipe demo --output_dir outputs/demo

train: $(INSTALLED) ## from nothing to heads of 2,000 Gaussians that read their portrait, in outputs/twenty-minutes (twenty minutes, CPU)
	$(BIN)/python -m training.recipe twenty-minutes --output_dir outputs/twenty-minutes

test: $(INSTALLED) ## all tests, two at a time (a quarter of an hour on two cores)
	$(PYTEST)

test-fast: $(INSTALLED) ## tests that take seconds
	$(PYTEST) -m "not slow and not distributed"

gpu: $(INSTALLED) ## everything that needs a GPU: tests and benchmarks, about an hour, resumable; PART=decoding for one, GPU="--write_docs"
	$(BIN)/python benchmarks/gpu.py $(if $(PART),--parts $(PART)) $(GPU)

newest: ## the tests of loading, training, generation and evaluation on the newest torch, transformers, ..., in .venv-newest
	$(PYTHON) .ci/newest.py

fuzz: $(INSTALLED) ## damaged files of every format for MINUTES=10 with SEED=0; findings in outputs/fuzz
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(MINUTES) --seed $(SEED)

chaos: $(INSTALLED) ## kills long commands KILLS=100 times with SEED=0 and compares bytes; CHAOS="--minutes 10 --only fit"
	$(BIN)/python tests/chaos/chaos.py --kills $(KILLS) --seed $(SEED) $(CHAOS)

check: $(INSTALLED) ## ruff lint and format, the direction of imports, mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

.PHONY: docs
docs: .venv/.docs ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

format: $(INSTALLED) ## rewrite to the house format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel: $(INSTALLED) ## a wheel of the toolkit, in dist
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean: ## remove the environment and outputs
	rm -rf .venv .venv-newest outputs build dist site *.egg-info
