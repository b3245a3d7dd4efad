# Everything runs in .venv, which is made on first use. `make help` lists the targets.
PYTHON ?= python3
JOBS ?= 2
PROFILE ?= laptop
ENGINE ?= make
ifneq ($(filter-out make ray,$(ENGINE)),)
$(error ENGINE = $(ENGINE); allowed: make, or ray (docs/cluster.md))
endif
ifneq ($(shell printf '%s' '$(JOBS)' | grep -cxE '[1-9][0-9]?'),1)
$(error JOBS = $(JOBS); allowed: a number of processes from 1 to 99)
endif
ifeq ($(strip $(PROFILE)),)
$(error PROFILE is empty; allowed: laptop, or a folder of profiles/)
endif
VENV := .venv
ifneq ($(wildcard $(VENV)/ready),)
ifneq ($(shell $(VENV)/bin/python -c 'print(1)' 2>/dev/null),1)
$(error $(VENV): its Python is gone or of another version; delete the folder $(VENV), and this command makes it anew)
endif
endif
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export TOKENIZERS_PARALLELISM := false
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
THREADS_PER_JOB := $(shell n=$$(( $(CORES) / $(JOBS) )); [ $$n -gt 0 ] && echo $$n || echo 1)
# A profile is a folder: the study's own for laptop, else one of profiles/.
FOLDER := $(if $(filter laptop,$(PROFILE)),.,profiles/$(PROFILE))
# Every recipe runs in the profile's folder; a stage ends when this process does.
IN = cd $(FOLDER) && export STUDY_STARTER=$$PPID &&
# A stage is given as the number of its line in scratch/stages, which are in the order that they run in, and its name.
STAGES = < scratch/stages grep -nE
STAGE = sh -c '[ "$$1" ] || exit 0; echo "stage $${1%%:*} of $$(($$(wc -l < scratch/stages))): $${1\#*:}"; \
  exec dvc --wait-for-lock repro --single-item "$${1\#*:}"' stage
ONE_BY_ONE = xargs -n 1 $(STAGE)
# GNU xargs numbers what runs side by side: each takes the GPU of its number.
NUMBERED := $(shell xargs --process-slot-var=STUDY_JOB true < /dev/null 2> /dev/null && echo --process-slot-var=STUDY_JOB)
SIDE_BY_SIDE = xargs $(NUMBERED) -P $(JOBS) -n 1 env OMP_NUM_THREADS=$(THREADS_PER_JOB) $(STAGE)

.PHONY: help environment check new plan repro measured report notebooks attention translations export students runtimes tune dynamics peers benchmark costs test test-fast test-units test-faults test-pipeline lint audit lab clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

environment: $(VENV)/ready  ## the virtual environment with everything pinned

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 to 3.14 is needed (make PYTHON=python3.12 ...)" >&2; exit 1; }
	@[ "$$(uname -sm)" != "Darwin x86_64" ] || { echo "error: PyTorch is there for macOS 14 on Apple silicon, not for Intel" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing the packages of constraints.txt into $(VENV): a few minutes, longer where PyTorch comes with CUDA"
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable ".[export]"
	touch $@

check: environment  ## validate params.yaml under PROFILE (default: laptop)
	@python -m study check $(PROFILE)

new: environment  ## a study of one's own: NAME=my-study ARGS="--teacher ... --text ... --task ..." (docs/extending.md)
	@python -m study new $(NAME) $(ARGS)

plan: environment  ## resolve params.yaml under PROFILE: a description of every stage
	@python -m study plan $(PROFILE) $(UNLOCK)
	@cd $(FOLDER) && mkdir -p scratch && dvc stage list --name-only > scratch/stages.$$$$ && mv scratch/stages.$$$$ scratch/stages

repro report students tune: UNLOCK := $(if $(filter make,$(ENGINE)),--unlock)

repro: plan  ## the whole study, or PROFILE=overnight or another folder of profiles/; JOBS=2 runs side by side; ENGINE=ray RAY_ADDRESS=auto CPUS=1 GPUS=0.5 on a cluster
ifeq ($(ENGINE),ray)
	@export STUDY_STARTER=$$PPID && python -m study grid $(PROFILE) $(if $(RAY_ADDRESS),--address $(RAY_ADDRESS)) $(if $(CPUS),--cpus $(CPUS)) $(if $(GPUS),--gpus $(GPUS))
else
	@$(IN) $(STAGES) '^(plan|notebooks|sources)$$' | $(ONE_BY_ONE)
	@$(IN) $(STAGES) '^tasks@' | $(SIDE_BY_SIDE)
	@$(IN) $(STAGES) '^corpus@' | $(SIDE_BY_SIDE)
	@$(IN) $(STAGES) '^teacher@' | $(ONE_BY_ONE)
	@$(IN) $(STAGES) '^(reference|distill)@' | $(SIDE_BY_SIDE)
	@rm -rf $(FOLDER)/scratch/teacher_outputs
	@$(IN) $(STAGES) '^(admit|evaluate|represent|neighbour)@' | $(SIDE_BY_SIDE)
	@$(IN) $(STAGES) '^latency@' | $(ONE_BY_ONE)
	@$(IN) $(STAGES) '^analyse@' | $(SIDE_BY_SIDE)
	@$(IN) $(STAGES) '^report$$' | $(ONE_BY_ONE)
	$(IN) dvc --wait-for-lock repro
endif

measured:
	@[ -n "$$(find $(FOLDER)/reports/results -name '*.json' 2>/dev/null | head -n 1)" ] || { \
	  echo "profile $(PROFILE) has no results yet; \`make repro PROFILE=$(PROFILE)\` makes them" >&2; exit 1; }

# The page shows what other profiles recommend, too, of which DVC does not know: always made anew.
report: measured plan  ## figures and pages of PROFILE again, from its committed results alone
	$(IN) dvc --wait-for-lock repro plan notebooks
	@$(IN) $(STAGES) '^analyse@' | $(SIDE_BY_SIDE)
	$(IN) dvc --wait-for-lock repro --single-item --force report

notebooks: report costs  ## pages of the notebooks that stand alone, executed anew, beside those that runs left: reports/notebooks
	python -m study run notebooks/05_methods.ipynb --executed $(FOLDER)/runs/notebooks/05_methods.ipynb
	python -m study report $(PROFILE)

attention: plan  ## what a teacher and students of PROFILE relate in a few sentences, for attention.html (SETTING=english STUDENTS="run run")
	python -m study run notebooks/72_attention.ipynb --executed $(FOLDER)/runs/notebooks/72_attention.ipynb -p profile $(PROFILE) \
	  -p setting $(or $(SETTING),english) $(if $(STUDENTS),-p students "$(STUDENTS)") \
	  -p output ../$(FOLDER)/reports/results/$(or $(SETTING),english)/attention.json

translations: plan  ## what a teacher and students of PROFILE take for the translation of a few sentences, for translations.html (SETTING=multilingual STUDENTS="run run")
	python -m study run notebooks/74_translations.ipynb --executed $(FOLDER)/runs/notebooks/74_translations.ipynb -p profile $(PROFILE) \
	  -p setting $(or $(SETTING),multilingual) $(if $(STUDENTS),-p students "$(STUDENTS)") \
	  -p output ../$(FOLDER)/reports/results/$(or $(SETTING),multilingual)/translations.json

export: environment  ## a student as programs load it: RUN=english_od_L3-H192_1 FORMAT=transformers|sentence-transformers|onnx|onnx-int8|onnx-int8-static|openvino TASK=sentiment TEXTS=texts/ TO=folder/
	@python -m study export $(RUN) --profile $(PROFILE) --format $(or $(FORMAT),transformers) $(if $(TASK),--task $(TASK)) $(if $(TEXTS),--keep-pieces-from "$(TEXTS)") $(if $(TO),--to "$(TO)")

students: plan  ## the students that the report of PROFILE recommends: pulled where a DVC remote is set, else trained
	$(IN) runs=$$(python -m study students $(PROFILE) | sed 's/^/distill@/') && [ -n "$$runs" ] && \
	  if dvc remote list | grep -q .; then dvc --wait-for-lock pull $$runs; else dvc --wait-for-lock repro plan notebooks && dvc --wait-for-lock repro $$runs; fi

tune: plan  ## choose learning rates on development data (writes reports/tuning of the profile)
	@python -m study tunings $(PROFILE) > $(FOLDER)/scratch/tunings
	$(IN) dvc --wait-for-lock repro plan notebooks
	$(IN) grep '^teacher@' scratch/stages | xargs dvc --wait-for-lock repro
	export STUDY_STARTER=$$PPID && < $(FOLDER)/scratch/tunings xargs $(NUMBERED) -P $(JOBS) -n 3 env OMP_NUM_THREADS=$(THREADS_PER_JOB) sh -c \
	  'python -m study run notebooks/35_tune.ipynb --executed $(FOLDER)/scratch/executed/tune_$$0_$$1.ipynb \
	  -p description ../$(FOLDER)/plan/tune/$$0_$$1.json -p output ../$$2/$$0/$$1.json'
	rm -rf $(FOLDER)/scratch/teacher_outputs
	python -m study tuned $(PROFILE)

peers: $(VENV)/peers  ## the public packages that the benchmark compares with, into .venv

$(VENV)/peers: $(VENV)/ready study/speed/peers.py
	python -m pip install --quiet $$(python -c 'from study.speed.peers import INSTALL; print(INSTALL)')
	touch $@

benchmark runtimes: AGAIN = $(if $(MEASURED),-p measured $(if $(filter /%,$(MEASURED)),,../)$(MEASURED))
benchmark: environment check $(if $(MEASURED),,peers)  ## speed of a training step beside its floor and public packages (half an hour, nothing else running; MEASURED=folder: its tables again)
	python -m study run notebooks/60_benchmark.ipynb --executed $(FOLDER)/runs/notebooks/60_benchmark.ipynb -p profile $(PROFILE) -p output ../reports/benchmark $(AGAIN)

costs: environment check  ## what runs cost: the cost model, checked and applied, from committed results alone
	python -m study run notebooks/65_cost_model.ipynb --executed $(FOLDER)/runs/notebooks/65_cost_model.ipynb -p profile $(PROFILE) -p output ../reports/costs
	python -m study run notebooks/65_grid_cost.ipynb --executed $(FOLDER)/runs/notebooks/65_grid_cost.ipynb -p profile $(PROFILE) -p output ../reports/costs
	python -m study run notebooks/66_clusters.ipynb --executed $(FOLDER)/runs/notebooks/66_clusters.ipynb -p output ../reports/costs

runtimes: environment check  ## what serves teacher and students how fast, and what it loses (SETTING=english; a quiet machine; MEASURED=file: its tables again)
	python -m study run notebooks/67_runtimes.ipynb --executed $(FOLDER)/runs/notebooks/67_runtimes.ipynb -p profile $(PROFILE) -p setting $(or $(SETTING),english) -p output ../$(FOLDER)/reports/runtimes $(AGAIN)

dynamics: plan  ## what a student's layers lose and gain while it trains (PROFILE=evidence SETTING=english; after its teacher)
	python -m study run notebooks/68_dynamics.ipynb --executed $(FOLDER)/runs/notebooks/68_dynamics.ipynb -p profile $(PROFILE) -p setting $(or $(SETTING),english) -p output ../$(FOLDER)/reports/dynamics

test: environment  ## all tests, the smoke profile end to end among them, side by side
	@$(MAKE) --no-print-directory -j 2 test-units test-pipeline

test-fast: environment  ## losses, mappings, activations, plan, statistics: under a minute
	OMP_NUM_THREADS=$(CORES) python -m pytest -m fast

test-faults: environment  ## mistakes and accidents with real files and processes, and bad inputs
	OMP_NUM_THREADS=$(CORES) python -m pytest -s -m faults

test-units: environment
	OMP_NUM_THREADS=$(THREADS_PER_JOB) python -m pytest -m 'not (pipeline or faults)' --durations=25

test-pipeline: environment
	OMP_NUM_THREADS=$(THREADS_PER_JOB) python -m pytest -m 'pipeline or faults' --durations=10

lint: environment  ## style, spelling and types
	ruff check . && ruff format --check . && codespell && mypy

audit: environment  ## known vulnerabilities of the pinned packages, as a report (the package index's database)
	@[ -x $(VENV)/audit/bin/pip-audit ] || { $(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip install --quiet pip-audit==2.10.1; }
	@python tests/faults/audit.py $(VENV)/audit/bin/pip-audit

lab: environment  ## open the notebooks, whose first parameters name profiles laptop, evidence and smoke
	@for profile in laptop evidence smoke; do python -m study plan $$profile || exit 1; done
	TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

clean:  ## remove scratch files and interrupted runs (never results, caches or sources)
	rm -rf scratch profiles/*/scratch
