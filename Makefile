PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Threads of torch and the BLAS below it while the tests run.
TEST_THREADS ?= 2

BIN := $(VENV)/bin
PACKAGES := $(wildcard distill export deploy evaluate)
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: help demo test lint clean
help:
	@echo "make demo   set up $(VENV), distil the built-in model to a quarter of its compute"
	@echo "            (DEMO_ARGS='--tokens 20000' adds arguments)"
	@echo "make test   lint, then the whole test suite (PYTEST_ARGS='-m \"not slow\"' for a part)"
	@echo "make lint   ruff check, ruff format --check, mypy"

demo: $(VENV)/.installed
	@start=$$(mktemp); \
	$(BIN)/python -m distill --budget 0.25 $(DEMO_ARGS) || { status=$$?; rm -f $$start; exit $$status; }; \
	manifest=$$(find runs -path '*/student/manifest.json' -newer $$start 2>/dev/null | head -1); \
	rm -f $$start; student=$${manifest%/manifest.json}; \
	if [ -n "$$student" ]; then \
	  echo; \
	  echo "student:  $$student"; \
	  echo "summary:  $$student/README.md"; \
	  echo "pictures: $${student%/student}/training.png, modules.png"; \
	fi

test: lint
	OMP_NUM_THREADS=$(TEST_THREADS) TOKENIZERS_PARALLELISM=false \
	  $(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES) scripts

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
