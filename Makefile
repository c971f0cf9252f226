PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check
READY := .venv/.ready
PEERS := .venv/.ready-peers
STYLED := $(wildcard fasterfold nbs tests benchmarks docs)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-nbs test-py test-oldest test-newest docs zoo bench results export readme style dist clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 13

# By name, since a comma ends what `call` passes
DEV := .[dev]
ALL := .[dev,bench]
# uv takes half a minute where pip takes minutes; where it cannot install, as behind a proxy that only pip knows, pip does
install = $(PIP) uv && $(BIN)/uv pip install --python $(BIN)/python -e '$(1)' || $(PIP) -e '$(1)'

# Set up again only if the requirements may have changed
$(READY): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3,10))' || \
		{ echo 'fasterfold needs Python 3.10 or newer: make PYTHON=python3.12 ...' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(call install,$(DEV))
	@touch $@

$(PEERS): $(READY)
	$(call install,$(ALL))
	@touch $@

setup: $(READY) ## Make .venv with fasterfold and its development tools in it

demo: $(READY) ## Train a small learner, fold it, report (pass options in ARGS)
	$(BIN)/fasterfold demo --force $(ARGS)

# The tests run side by side: one thread each
test-nbs test-py test-oldest test-newest: export OMP_NUM_THREADS := 1
test-nbs test-py: export PATH := $(CURDIR)/$(BIN):$(PATH)

test: test-nbs test-py ## Run all tests: those of the notebooks, then those in tests/

test-nbs: $(READY)
	$(BIN)/nbdev-test --n-workers $(JOBS)

test-py: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

test-oldest: ## Run tests/ on the oldest releases that settings.ini allows, in .venv-oldest
test-newest: ## Run tests/ on the newest releases there are, in .venv-newest
test-oldest: PIN := s/>=/==/

test-oldest test-newest: test-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	sed -n 's/^requirements = //p' settings.ini | tr ' ' '\n' | sed '$(PIN)' > .venv-$*/pins.txt
	.venv-$*/bin/python -m pip install --disable-pip-version-check --upgrade --upgrade-strategy eager -c .venv-$*/pins.txt -e '.[test]'
	.venv-$*/bin/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

docs: $(READY) ## Build the site into docs/_build
	$(BIN)/python docs/build.py $(ARGS)

zoo: $(PEERS) ## Fold model zoos, side by side with other tools
	$(BIN)/python benchmarks/zoo.py $(ARGS)

bench: $(PEERS) ## Measure folding, latency and folded validation, side by side with other tools and engines
	$(BIN)/python benchmarks/fold.py $(ARGS)
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/latency.py $(ARGS)
	$(BIN)/python benchmarks/validation.py $(ARGS)

results: $(PEERS) ## Measure all figures anew, on a machine that does nothing else (a day), and write them as CSV, too
	$(BIN)/python benchmarks/zoo.py --redo
	$(MAKE) bench
	$(BIN)/python benchmarks/certify.py --minutes 600
	$(BIN)/python benchmarks/random_networks.py --minutes 600
	$(BIN)/python benchmarks/random_folds.py --minutes 600
	$(BIN)/python benchmarks/onnx_norms.py --minutes 600
	$(BIN)/python docs/results.py
	$(MAKE) readme

export: $(READY) ## Write fasterfold/*.py from the notebooks, and clean these
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

readme: $(READY) ## Write README.md from nbs/index.ipynb
	$(BIN)/python docs/readme.py

style: $(READY) ## Check the style of code and notebooks
	$(BIN)/chkstyle $(STYLED)

dist: $(READY) ## Build the wheel and the source distribution into dist/
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean: ## Remove what was built, the environment aside
	rm -rf build dist *.egg-info _proc docs/_build .pytest_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +
