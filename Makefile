# Everything runs in .venv, which is made on first use. `make help` lists the targets.
PYTHON ?= python3
JOBS ?= 2
PROFILE ?=
SETTING ?= english
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export TOKENIZERS_PARALLELISM := false
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
THREADS_PER_JOB := $(shell n=$$(( $(CORES) / $(JOBS) )); [ $$n -gt 0 ] && echo $$n || echo 1)
LIST = mkdir -p scratch && dvc stage list --name-only > scratch/stages
STAGES = < scratch/stages grep -E
ACTIVE = $$(sed -n "s/^profile: *\([a-z]*\).*/\1/p" params.yaml)
CELLS = xargs -P $(JOBS) -n 1 env OMP_NUM_THREADS=$(THREADS_PER_JOB) dvc --wait-for-lock repro --single-item

.PHONY: help environment check profile repro report tune peers benchmark costs test test-units test-pipeline lint lab clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

environment: $(VENV)/ready  ## the virtual environment with everything pinned

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed (make PYTHON=python3.12 ...)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

check: environment  ## validate params.yaml
	@python -m study check

profile: environment  ## switch params.yaml to PROFILE=smoke|laptop|overnight
	@test -n "$(PROFILE)" || { echo "error: which profile? make profile PROFILE=smoke|laptop|overnight" >&2; exit 1; }
	@python -m study use $(PROFILE)

repro: environment $(if $(PROFILE),profile,check)  ## the whole study for the active profile (or PROFILE=...), JOBS=2 cells side by side
	$(LIST)
	$(STAGES) '^(params|notebooks|sources@|fingerprint)' | xargs dvc repro
	$(STAGES) '^tasks@' | $(CELLS)
	$(STAGES) '^corpus@' | $(CELLS)
	$(STAGES) '^teacher@' | xargs dvc repro
	$(STAGES) '^distill' | $(CELLS)
	rm -rf scratch/teacher_outputs
	$(STAGES) '^(ceiling|evaluate|represent)' | $(CELLS)
	$(STAGES) '^latency' | xargs dvc repro --single-item
	$(STAGES) '^(compare|ablate|similarity)' | $(CELLS)
	dvc repro

report: environment check  ## figures and pages again, from the committed results alone
	$(LIST)
	dvc repro params notebooks
	$(STAGES) '^(compare|ablate|similarity)@' | $(CELLS)
	$(STAGES) '^report@' | xargs dvc repro --single-item

tune: environment check  ## choose learning rates of SETTING on development data (writes reports/tuning)
	@python -m study cells $(SETTING) > /dev/null
	$(LIST)
	$(STAGES) '^(params|notebooks|teacher@)' | xargs dvc repro
	python -m study cells $(SETTING) | xargs -P $(JOBS) -n 2 env OMP_NUM_THREADS=$(THREADS_PER_JOB) sh -c \
	  'python -m study run notebooks/35_tune.ipynb --executed scratch/notebooks/tune_$$0_$$1.ipynb \
	  -p profile $(ACTIVE) -p setting $(SETTING) -p method $$0 -p student $$1 \
	  -p output ../reports/tuning/$(SETTING)/$$0_$$1.json'
	rm -rf scratch/teacher_outputs
	python -m study tuned

peers: $(VENV)/peers  ## the public packages that the benchmark compares with, into .venv

$(VENV)/peers: $(VENV)/ready study/evaluation/peers.py
	python -m pip install --quiet $$(python -c 'from study.evaluation.peers import INSTALL; print(INSTALL)')
	touch $@

benchmark: environment check peers  ## speed of a training step beside its floor and public packages (half an hour, nothing else running)
	python -m study run notebooks/60_benchmark.ipynb -p profile $(ACTIVE) -p output ../reports/benchmark

costs: environment check  ## what runs cost: the cost model, checked and applied, from committed results alone
	python -m study run notebooks/65_cost_model.ipynb -p profile $(ACTIVE) -p output ../reports/costs

test: environment  ## the tests, the smoke profile end to end among them, side by side
	@$(MAKE) --no-print-directory -j 2 test-units test-pipeline

test-units: environment
	OMP_NUM_THREADS=$(THREADS_PER_JOB) python -m pytest -m 'not pipeline'

test-pipeline: environment
	OMP_NUM_THREADS=$(THREADS_PER_JOB) python -m pytest -m pipeline

lint: environment  ## style
	ruff check . && ruff format --check .

lab: environment  ## open the notebooks
	TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 jupyter lab notebooks

clean:  ## remove scratch files and interrupted runs (never results, caches or sources)
	rm -rf scratch
