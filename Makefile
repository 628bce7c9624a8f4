# Each target makes .venv where there is none. A stamp in it keeps later runs fast; it is renewed
# when pyproject.toml or constraints.txt change.

PYTHON ?= python3
PYTEST_ARGS ?=
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: help demo test lint docs clean

help:
	@echo "make demo   train and distil on the sample, then compare (no download after installation)"
	@echo "make test   ruff, mypy, pytest with doctests and coverage"
	@echo "make lint   ruff and mypy, with ruff's repairs applied"
	@echo "make docs   API reference in site/"
	@echo "make clean  remove what building left (not .venv)"

demo: $(VENV)/.installed-demo
	$(BIN)/capdistill demo

# One process of tests a core (at most 8, each holds PyTorch), one thread in each.
test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal --cov=capdistill $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	$(BIN)/pdoc --docformat google --output-directory site \
		capdistill capdistill.registry capdistill.outputs capdistill.encoders.base \
		capdistill.decoders.base capdistill.losses.base
	@echo "open site/index.html"

clean:
	rm -rf build dist site src/*.egg-info examples/plugin/build examples/plugin/src/*.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Editable everywhere, so that no target leaves an older copy in .venv for another to find.
$(VENV)/.installed-demo: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[ui]'
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[test]'
	touch $@

$(VENV)/.installed-docs: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[ui,docs]'
	touch $@
