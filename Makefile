# make demo    a model trained on MovieLens-100k, ranking for you in a page
# make test    lint, types and every test
# make help    the rest
.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench peers docs lock clean

PYTHON ?=
GPU ?=
TORCH_INDEX ?=
export PYTHON GPU TORCH_INDEX
BIN := .venv/bin
STAMP := .venv/.installed

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /: /' | awk -F': ' '{printf "make %-8s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml requirements.lock packaging/environment.sh packaging/fbgemm-gpu/pyproject.toml
	@sh packaging/environment.sh

install: $(STAMP)  ## .venv with plexrank and its tools; GPU=1 for CUDA, TORCH_INDEX=URL for another source of torch

demo: $(STAMP)  ## train on MovieLens-100k, then serve a page that re-orders when you click
	@$(BIN)/plexrank demo

test: lint  ## lint, types and every test
	@sh packaging/test-tools.sh
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)  ## ruff and mypy
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/mypy engine plugins serving models

format: $(STAMP)  ## let ruff write
	@$(BIN)/ruff check -q --fix .
	@$(BIN)/ruff format -q .

bench: $(STAMP)  ## every figure that the README shows; slow
	@$(BIN)/python -m benchmarks

peers: $(STAMP)  ## the libraries that bench compares with, in an environment of their own
	@$(BIN)/python -m benchmarks.peers.environment

docs: $(STAMP)  ## write the pages of docs/ that come from the code
	@$(BIN)/python docs/build.py

lock: $(STAMP)  ## write requirements.lock from what is installed now
	@$(BIN)/python -m pip freeze --disable-pip-version-check --exclude plexrank --exclude fbgemm-gpu --exclude-editable \
		| sed -E 's/\+cpu$$//' | grep '==' >requirements.lock

clean:  ## remove .venv, runs and caches
	@rm -rf .venv .venv-peers runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info packaging/*/*.egg-info
	@find . -name __pycache__ -prune -exec rm -rf {} +
