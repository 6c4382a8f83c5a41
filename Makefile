# Each target is explained by the text behind its two hashes; `make help` prints them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := dev,sweeps,export,embed
INSTALLED := $(VENV)/installed
DOCS_INSTALLED := $(VENV)/installed-docs
ARGS ?=
# As many test processes as cores, one BLAS thread each: more threads than cores make every test slower.
WORKERS ?= auto
SEEDS ?= 3
JOBS ?= 1
# Seconds after which a job of the benchmark is ended as too slow.
LIMIT ?= 1200

.DEFAULT_GOAL := help
.PHONY: help install train test benchmark report gif docs notebook lint typecheck format wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9%-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The first interpreter that is Python 3.11 to 3.13: the one named by PYTHON, then the usual names.
$(BIN)/python:
	@set -e; for candidate in $(PYTHON) python3.13 python3.12 python3.11; do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
	  then echo "using $$("$$candidate" --version) for $(VENV)"; exec "$$candidate" -m venv $(VENV); fi; done; \
	echo "make: no Python 3.11, 3.12 or 3.13 with venv found; install one, or say make PYTHON=/path/to/python3.12" >&2; exit 1

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

install: $(INSTALLED) ## build .venv and install the project with its tools

train: install ## install, then cluster the digits without a K (ARGS adds overrides)
	$(BIN)/deepdpm-train $(ARGS)

test: install ## install, then run all tests (ARGS='tests/test_x.py -x' picks)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

table-%: install ## run what is missing of a table: make table-embedded SEEDS=10 (JOBS at a time, ARGS adds options)
	$(BIN)/deepdpm-table $* --seeds $(SEEDS) --jobs $(JOBS) $(ARGS)

# A benchmark of minutes: USPS, and generated data of up to 100,000 points.
QUICK := usps,usps_imbalanced,points,dimensions,clusters

benchmark: install ## quality, time and memory beside peers (BENCH=quick takes minutes, SEEDS=1)
	$(BIN)/deepdpm-table benchmarks --seeds $(SEEDS) --limit $(LIMIT) $(if $(filter quick,$(BENCH)),--rows $(QUICK)) $(ARGS); \
	ended=$$?; $(BIN)/python -m deepdpm.report.benchmark && exit $$ended

report: install ## write the report of all runs below multirun_outputs/
	$(BIN)/deepdpm-report $(ARGS)

gif: install ## draw docs/synthetic.gif and docs/digits.png (about a minute)
	$(BIN)/python -m deepdpm.report.animation docs

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$(EXTRAS),docs]'
	@touch $@

docs: $(DOCS_INSTALLED) ## build the site of guide, mathematics and API reference into build/docs (half a minute)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file .mkdocs.yml

notebook: $(DOCS_INSTALLED) ## execute docs/notebook.ipynb anew, in place
	$(BIN)/jupyter nbconvert --to notebook --execute --ExecutePreprocessor.record_timing=False --inplace docs/notebook.ipynb

lint: install ## check style and formatting with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: install ## check types with mypy
	$(BIN)/mypy

format: install ## let ruff order imports and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: install ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## remove .venv and everything built, not the runs
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
