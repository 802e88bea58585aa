# The checks, one word each. In an environment with requirements-dev.txt; another interpreter: make test PYTHON=python3.12
PYTHON ?= python

.DEFAULT_GOAL := help
.PHONY: help install test slow lint format notebooks bench ci

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1\t/' | expand -t 12

install:  ## what the checks need
	$(PYTHON) -m pip install -r requirements-dev.txt

test:  ## the suite
	$(PYTHON) -m pytest -q

slow:  ## the tests marked slow, which the suite leaves out
	$(PYTHON) -m pytest -q -m slow --no-loadscope-reorder

lint:  ## linter, formatter, types; changes nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format:  ## let ruff mend what it can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

notebooks:  ## run every notebook and keep no output
	$(PYTHON) notebooks/run.py --check

bench:  ## every benchmark of this machine's device
	$(PYTHON) -m benchmarks.speed

ci:  ## all of it in a fresh environment, as CI does
	.ci/run
