# make demo | make test: each sets up .venv first if needed. PYTHON chooses the interpreter (3.10 to 3.13).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint bench clean

setup: .venv/.ready

# Byte-compiled at install: without it every Dask worker and flow pays seconds of CPU to import Prefect.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Shoal needs Python 3.10 or newer; give one: make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[ont,models,dev]'
	for extra in accuracy scrappie; do \
	  PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$$extra]" 2>/dev/null || \
	  echo "the extra $$extra can't be built here (README, 'Extras'): its tests will be skipped"; \
	done
	$(BIN)/python -m compileall -q .venv/lib || true
	touch $@

demo: setup
	$(BIN)/shoal demo --out demo-run

# Programs that read what we write, each in an environment of its own: their needs and ours exclude each other.
.venv/readers/.ready: .venv/.ready tests/readers/nanoplot.txt tests/readers/toulligqc.txt
	for reader in nanoplot toulligqc; do \
	  $(PYTHON) -m venv .venv/readers/$$reader && \
	  .venv/readers/$$reader/bin/pip install --quiet --disable-pip-version-check -r tests/readers/$$reader.txt || \
	  { rm -rf .venv/readers/$$reader; echo "$$reader can't be installed here: its test will be skipped"; }; \
	done
	touch $@

test: setup .venv/readers/.ready lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m tests.benchmarks.cost

clean:
	rm -rf .venv demo-run build *.egg-info
