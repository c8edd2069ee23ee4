# Python 3.11 or newer and make are all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A stamp for each set of packages that is installed; a change of pyproject.toml installs again.
CORE := $(VENV)/.core-installed
TEST := $(VENV)/.test-installed

# Two workers, of which one takes over from the other what it has not begun.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-all test-golden test-oldest fuzz bench lint clean

## demo: train a small GPT-2 on this computer, generate, export it to Hugging Face (about 3 minutes)
demo: $(CORE)
	$(BIN)/python -m train.demo

## test: the suite (15 to 25 minutes on two cores)
test: $(TEST)
	$(PYTEST) -m "not slow and not exhaustive"

## test-all: the suite, all combinations and every command of the docs, then everything slow, in programs compiled as users have them
# Types, which `make test` has checked, go unchecked.
test-all: test
	JAXTYPING_DISABLE=1 $(PYTEST) -m "exhaustive and not slow"
	JAXTYPING_DISABLE=1 OPTIMIZED_TESTS=true $(PYTEST) -m slow

## test-golden: without PyTorch, the arrays that the original computed; for a new Python: make test-golden PYTHON=python3.14
test-golden:
	$(PYTHON) -m venv $(VENV)-golden
	$(VENV)-golden/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test-golden]'
	$(VENV)-golden/bin/python -m pytest -n 2 tests/parity/test_golden_*.py

## test-oldest: the suite with the oldest versions that pyproject.toml allows, which uv finds and pip cannot
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(VENV)-oldest/bin/uv pip install --quiet --python $(VENV)-oldest/bin/python --resolution lowest-direct \
		-e '.[test,test-peers]'
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not exhaustive"

## fuzz: every reader of files against 10,000 damaged inputs (`make test` tries 300)
fuzz: $(TEST)
	FUZZ_INPUTS=10000 $(BIN)/python -m pytest -n 2 tests/fuzz

## bench: measure ourselves beside PyTorch, write docs/benchmarks.md (needs a C compiler and an idle machine)
bench: $(TEST)
	$(BIN)/python -m bench.run --write docs/benchmarks.md

## lint: style, formatting and types
lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-golden $(VENV)-oldest .cache .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=python3.12 (or newer)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(CORE): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(TEST): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,test-peers]'
	@touch $@ $(CORE)
