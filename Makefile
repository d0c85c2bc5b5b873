# Each target sets up what it needs. On a fresh machine: `make demo`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# The CPU build, unless there is an NVIDIA GPU. Where this index cannot be reached, the plain package is taken.
TORCH_INDEX ?= $(shell nvidia-smi >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)
WORKERS ?= 2
BENCH ?= step scaling sampling time_to_accuracy
ARGS ?=
# The older of the two eras of TRL, with what it needs of older packages; Unsloth knows none that is newer.
ERA ?= trl==1.15.0 transformers==5.17.0 huggingface_hub<2 httpx httpcore certifi idna
UNSLOTH ?= unsloth==2026.10.9 unsloth_zoo==2026.10.9 requests urllib3 charset_normalizer
# What Google Colab's kernel has, and what these need (github.com/googlecolab/backend-info, August 2026).
COLAB ?= ipywidgets==7.7.1 anywidget==0.9.21 ipykernel==6.17.1 ipython==7.34.0 traitlets==5.7.1 jupyter_client==7.4.9 \
         ipython_genutils decorator pickleshare backcall nest_asyncio entrypoints transformers==5.15.0 accelerate==1.14.0 \
         peft==0.20.0 tokenizers==0.22.2 huggingface_hub<2 httpx httpcore certifi idna
TRAINER ?= $(patsubst %,tests/test_learn_%.py,config inputs inside hosting taught trainer) $(wildcard tests/test_trainer*.py)

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile  # modules are compiled when they are first imported
QUIET := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test drift test-slow test-browser test-zero3 test-unsloth test-colab test-era test-matrix export run-notebooks docs bench release-check demo-model clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.package  ## Train the embedded model and write report.html; options in ARGS="--method grpo --steps 20".
	@$(BIN)/sdpo-nb demo $(ARGS)

test: .venv/.dev  ## Run every check and test that needs no GPU and no network; some of pytest's alone: ARGS=tests/test_core_text.py.
	@$(if $(ARGS),,$(BIN)/python tools/sync_settings.py --check)
	@$(if $(ARGS),,$(BIN)/python tools/layers.py > /dev/null)
	@$(if $(ARGS),,$(BIN)/python tools/drift.py)
	@echo "== pytest: the chapters' lessons as tests, and those written by hand"
	@$(QUIET) $(BIN)/python -m pytest --quiet -rs -n $(WORKERS) --dist loadfile $(ARGS)
	@$(if $(ARGS),,echo "== nbdev-test: the notebooks that are no chapters, and have no tests of their own")
	@$(if $(ARGS),,$(QUIET) MPLBACKEND=Agg $(BIN)/nbdev-test --skip-file-re '^01_quickstart|^[0-9]+[a-z]*_.+[.].+[.]' --n-workers $(WORKERS))

drift: .venv/.dev  ## Refuse generated files that differ from their notebooks, and files that are neither committed nor ignored.
	@$(BIN)/python tools/drift.py --committed

test-slow: .venv/.dev  ## Run the tests that take minutes: runs that are stopped at any moment.
	@$(QUIET) $(BIN)/python -m pytest --quiet -m "slow and not gpu and not net and not browser" $(ARGS)

test-browser: .venv/.browser  ## Look at reports and notebooks with Chromium; without one this skips, and says so.
	@$(QUIET) $(BIN)/python -m pytest --quiet -rs -m browser $$(grep -l mark.browser tests/test_*.py) $(ARGS)

test-zero3: .venv/.dev  ## Run the test of DeepSpeed's third stage, with DeepSpeed in a folder that nothing else sees.
	@$(PIP) --upgrade --no-deps --target .venv/deepspeed deepspeed einops hjson msgpack ninja py-cpuinfo
	@PYTHONPATH=.venv/deepspeed TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv/deepspeed/built $(QUIET) $(BIN)/python -m pytest --quiet tests/test_teachers.py tests/test_trainer_processes.py -k zero_3

test-unsloth: .venv/.unsloth  ## Run the trainer beside Unsloth, in folders that nothing else sees.
	@PYTHONPATH=$(CURDIR)/.venv/unsloth:$(CURDIR)/.venv/era $(QUIET) $(BIN)/python -m pytest --quiet tests/test_unsloth_compat.py $(ARGS)

test-colab: .venv/.colab  ## Run widgets and quickstart with Google Colab's packages, in a folder that nothing else sees.
	@PYTHONPATH=$(CURDIR)/.venv/colab $(QUIET) $(BIN)/python -m pytest --quiet tests/test_colab.py tests/test_quickstart.py $(ARGS)

test-era: .venv/.era  ## Run the trainer's tests with the older TRL and Transformers that Unsloth allows.
	@echo "== $(ERA)"
	@PYTHONPATH=$(CURDIR)/.venv/era $(QUIET) $(BIN)/python -m pytest --quiet -n $(WORKERS) --dist loadfile $(TRAINER) $(ARGS)

test-matrix: test-era  ## Run them with both eras.
	@echo "== those of .venv"
	@$(QUIET) $(BIN)/python -m pytest --quiet -n $(WORKERS) --dist loadfile $(TRAINER) $(ARGS)

export: .venv/.dev  ## Write the package, its tests and the README from the notebooks.
	@PYTHONPATH=. $(BIN)/nbdev-export
	@$(BIN)/nbdev-clean
	@$(BIN)/python tools/make_readme.py

run-notebooks: .venv/.dev  ## Run the notebooks and keep their outputs.
	@$(QUIET) MPLBACKEND=Agg PYTHONWARNINGS=ignore::FutureWarning $(BIN)/nbdev-test --skip-file-re '^([_.]|01_quickstart)' --save --n-workers $(WORKERS)
	@$(BIN)/nbdev-clean

docs: .venv/.dev  ## Build the site into _docs, with Quarto where it is installed; refuse what a reader would stumble over.
	@$(QUIET) PYTHONPATH=. $(BIN)/python -c "from nbdev import quarto; quarto.refresh_quarto_yml(); quarto.proc_nbs(force=True)"
	@if command -v quarto >/dev/null; then $(BIN)/python -m tools.make_site --check && PYTHONPATH=. $(BIN)/nbdev-docs && \
	  $(BIN)/python -m tools.make_site --finish _docs; else $(BIN)/python -m tools.make_site; fi

bench: .venv/.package  ## Measure seconds, memory and learning beside TRL, minutes; one, at length: BENCH=step ARGS=--long.
	@for name in $(BENCH); do echo "== $$name"; \
	  $(BIN)/python benchmarks/$$name.py --out benchmarks/results/$$name.json $(ARGS) || exit 1; done

release-check: .venv/.dev  ## Build sdist and wheel, install each afresh, run what the README promises; ARGS=--shared is quicker.
	@$(BIN)/python tools/release_check.py --torch "$(TORCH)" --torch-index "$(TORCH_INDEX)" $(ARGS)

demo-model: .venv/.package  ## Make the embedded model again from its recipe: one thread, minutes.
	@OMP_NUM_THREADS=1 $(BIN)/python tools/demo_model.py $(ARGS)

clean:  ## Remove what the other targets made, and pages of runs; not .venv, and no checkpoints.
	@rm -rf _docs _proc build dist *.egg-info .pytest_cache .mypy_cache .hypothesis report.html compared.html lens.html

.venv/.python:
	@$(PYTHON) -c "import sys, ensurepip, venv; assert sys.version_info >= (3, 11)" 2>/dev/null || \
	  { echo "$(PYTHON) is no Python >= 3.11 with venv (Debian: install python3-venv); name one: make PYTHON=..."; exit 1; }
	@echo "== making .venv"
	@$(PYTHON) -m venv .venv && touch $@

.venv/.torch: .venv/.python
	@echo "== installing $(TORCH) (minutes, once)"
	@$(if $(TORCH_INDEX),$(PIP) --retries 0 --timeout 15 --index-url $(TORCH_INDEX) "$(TORCH)" 2>/dev/null ||) $(PIP) "$(TORCH)"
	@touch $@

.venv/.package: .venv/.torch settings.ini
	@echo "== installing sdpo-nb (minutes, once)"
	@$(PIP) --editable . && touch $@

.venv/.dev: .venv/.torch settings.ini
	@echo "== installing sdpo-nb and its tools (minutes, once)"
	@$(PIP) --editable '.[dev]' && touch $@ .venv/.package

.venv/.browser: .venv/.dev
	@echo "== installing playwright and two Jupyters (minutes, once)"
	@$(PIP) --editable '.[browser]' && touch $@

.venv/.era: .venv/.dev
	@echo "== installing $(ERA) (minutes, once)"
	@$(PIP) --upgrade --no-deps --target .venv/era $(patsubst %,'%',$(ERA)) && touch $@

.venv/.unsloth: .venv/.era
	@echo "== installing $(UNSLOTH) (minutes, once)"
	@$(PIP) --upgrade --no-deps --target .venv/unsloth $(UNSLOTH) && touch $@

.venv/.colab: .venv/.dev
	@echo "== installing $(COLAB) (minutes, once)"
	@$(PIP) --upgrade --no-deps --target .venv/colab $(patsubst %,'%',$(COLAB)) && touch $@
