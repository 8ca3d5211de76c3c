PYTHON ?= python3
VENV ?= .venv
# What `make install` and `make demo` install beside the core (see pyproject.toml).
EXTRAS ?= cpu,serve
DEMO_ARGS ?=
DEMO_RUN ?= runs/demo
PYTEST_ARGS ?=
# Threads of torch and the BLAS below it while the tests run.
TEST_THREADS ?= 2

BIN := $(VENV)/bin
PACKAGES := $(wildcard distill export deploy evaluate)
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: help install demo test browser test-optimum lint clean
help:
	@echo "make demo   set up $(VENV), distil the built-in model (a quarter of its layers' MACs), export it,"
	@echo "            generate text with its engine and write the report"
	@echo "            (DEMO_ARGS='--tokens 20000' adds arguments)"
	@echo "make test   lint, then the whole test suite (PYTEST_ARGS='-m \"not slow\"' for a part)"
	@echo "make test-optimum   the ONNX directory in optimum, in an environment of its own"
	@echo "make install   $(VENV) with EXTRAS=$(EXTRAS)"
	@echo "make lint   ruff check, ruff format --check, mypy"

install: $(VENV)/.installed

demo: $(VENV)/.installed
	@if [ -f $(DEMO_RUN)/student/manifest.json ]; then \
	  echo "$(DEMO_RUN)/student is finished and is used as it is"; \
	elif [ -f $(DEMO_RUN)/request.json ]; then \
	  $(BIN)/python -m distill --run $(DEMO_RUN) --resume; \
	else \
	  $(BIN)/python -m distill --run $(DEMO_RUN) --budget 0.25 $(DEMO_ARGS); \
	fi
	$(BIN)/python -m export --run $(DEMO_RUN) --engine ort --precision fp32 int8
	$(BIN)/python -m deploy generate --run $(DEMO_RUN) --max-tokens 48 "The capital of France is"
	$(BIN)/python -m evaluate --run $(DEMO_RUN)
	@echo; echo "student: $(DEMO_RUN)/student/README.md"; echo "report:  $(DEMO_RUN)/report/report.html"

test: lint browser
	OMP_NUM_THREADS=$(TEST_THREADS) TOKENIZERS_PARALLELISM=false \
	  $(BIN)/python -m pytest -q $(PYTEST_ARGS)

# The report's page is tested in a real browser; continuous integration installs one.
browser:
	@command -v chromium >/dev/null || [ -z "$$CI" ] || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null \
	  || echo "chromium cannot be installed: its tests are skipped"

test-optimum: .venv-optimum/.installed
	.venv-optimum/bin/python -m pytest -q tests/optimum

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES) scripts

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

.venv-optimum/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/python -m pip install --disable-pip-version-check -q \
	  torch==2.13.0 pytest pytest-timeout -e '.[optimum]'
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
