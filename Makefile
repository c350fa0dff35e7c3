# The commands of this project. Every target does its own set-up; `make setup` is idempotent and, once
# done, needs no network.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
BIN := .venv/bin
ARGS ?=
N ?= 200

.PHONY: help setup doctor demo test check format bench chaos soak clean

help:
	@echo "make demo    set up, check this machine, move a live Redis a->b and back"
	@echo "make test    set up, run the tests          (ARGS='tests/core -k name')"
	@echo "make check   ruff, mypy strict, import-linter"
	@echo "make bench   measure downtime against CRIU's own ways -> bench/results/downtime.json"
	@echo "make chaos   the whole fault matrix        (ARGS='--failed', '--phase dumped --victim nats', --list)"
	@echo "make soak    N=200 consecutive moves -> bench/results/soak.json"
	@echo "make setup   .venv, Debian packages, CRIU >= 4.2; idempotent"
	@echo "make format  ruff format and safe fixes"

setup:
	@scripts/setup

doctor: setup
	@$(BIN)/whimbrel doctor

demo: doctor
	@$(BIN)/whimbrel demo $(ARGS)

test: setup
	@$(BIN)/python -m pytest $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p whimbrel
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	@$(BIN)/python -m bench $(ARGS)

chaos: setup
	@if [ -z "$(ARGS)" ]; then $(BIN)/python -m pytest -q -m "long or not long" \
		tests/chaos/test_link_faults.py tests/chaos/test_resources.py; fi
	@PYTHONPATH=src:. $(BIN)/python -m bench.chaos $(ARGS)

soak: setup
	@$(BIN)/python bench/soak.py --moves $(N) $(ARGS)

clean:
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
