# `make demo` trains, evaluates and films an agent; `make test` is what CI runs.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/montezuma-first-key

.PHONY: help install demo test lint format bench clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: .venv/installed  ## a virtual environment with the command `demoreset`

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[trainer,elastic]'
	@touch $@

.venv/tested: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[trainer,elastic,operator]' \
		--group test --group lint
	@touch $@

demo: install  ## from a demonstration to a policy that takes Montezuma's first key, with a film
	$(BIN)/demoreset run -f demos/montezuma-first-key.yaml
	$(BIN)/demoreset evaluate $(RUN) --noise none,sticky --act sampled,argmax --max-frames 3600
	$(BIN)/demoreset video $(RUN) --force

lint: .venv/tested  ## style, types, import contracts, the Dockerfile
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

test: lint  ## lint, and all tests
	$(BIN)/pytest -m "not alone" --numprocesses auto --dist loadfile; \
		others=$$?; $(BIN)/pytest -m alone && exit $$others

format: .venv/tested  ## put the code into shape, and make what is generated from it
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/python -m demoreset_api.crd | tee manifests/base/crd.yaml > charts/demoreset/files/crd.yaml
	$(BIN)/python -m demoreset_api.reference > docs/run.md
	$(BIN)/python charts/demoreset/dashboards.py

bench: install  ## the benchmarks that need nothing more; benchmarks/README.md has all
	$(BIN)/python benchmarks/slots.py
	$(BIN)/python benchmarks/memory.py

clean:  ## all that can be made again, but runs
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist
