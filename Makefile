.DEFAULT_GOAL := help
.PHONY: help setup quickstart test format clean

# make quickstart ARGS="--steps 10"   passes options on to the command
# make setup PYTHON=python3.12        chooses the interpreter
ARGS ?=
PYTHON ?=

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

setup: ## create or update .venv (quick when nothing changed)
	@PYTHON="$(PYTHON)" scripts/setup

quickstart: setup ## quantize, train, evaluate and report on the embedded model
	@.venv/bin/python -m softtrellis quickstart $(ARGS)

test: setup ## ruff, mypy and pytest
	@scripts/check $(ARGS)

format: setup ## let ruff format the code and fix what it can
	@.venv/bin/python -m ruff check --fix .
	@.venv/bin/python -m ruff format .

clean: ## remove .venv and the caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist
