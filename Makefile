# make demo | make test: each sets up .venv first if needed. PYTHON chooses the interpreter (3.10 to 3.13).
PYTHON ?= python3
BIN := .venv/bin
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check
CANT = the extra $(1) can't be built here (README, 'Extras'): its tests will be skipped

.PHONY: setup demo test lint bench clean

setup: .venv/.ready

# What builds with a C compiler may fail; pip would keep a wheel of scrappie that was built without its headers for ever.
# Byte-compiled at install: without it every Dask worker and flow pays seconds of CPU for its imports.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Shoal needs Python 3.10 or newer; give one: make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --editable '.[ont,models,dev]'
	$(PIP) --editable '.[accuracy]' 2>/dev/null || echo "$(call CANT,accuracy)"
	$(PIP) --no-cache-dir --editable '.[scrappie]' 2>/dev/null && $(BIN)/python -c 'import scrappy' || echo "$(call CANT,scrappie)"
	$(BIN)/python -m compileall -q .venv/lib deployments flows infra tasks || true
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

# Four processes on two cores: the tests of clusters and servers mostly wait.
test: setup .venv/readers/.ready lint
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m tests.benchmarks.cost

clean:
	rm -rf .venv demo-run build *.egg-info
