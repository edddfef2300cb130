# make quickstart   virtual environment, install, the whole story on real images, report.html
# make test         virtual environment, install with the test extras, run the tests
# make lint         style, types and import rules
# Another interpreter: make PYTHON=python3.12 test. Another place for the environment: make VENV=/path test.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST_ARGS ?=

.PHONY: help quickstart test lint format docs ci pins clean

help:
	@sed -n 's/^# //p' Makefile

quickstart: $(VENV)/installed
	$(BIN)/deltafl quickstart --overwrite

test: $(VENV)/installed-test
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

ci:
	.ci/run

pins: $(VENV)/installed-dev $(VENV)/installed-docs $(VENV)/installed-harness
	$(BIN)/python .ci/pin.py

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# Stamps: an install runs again only when what it depends on has changed.
$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("deltafl needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml constraints.txt
	$(INSTALL) -e .
	@touch $@

$(VENV)/installed-%: $(VENV)/created pyproject.toml constraints.txt
	$(INSTALL) -e '.[$*]'
	@touch $@
