# make demo: everything from nothing to a searchable student; make test: what the continuous integration runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Training frees and takes large buffers at every step; returning them to the system each time costs page faults.
export MALLOC_TRIM_THRESHOLD_ := 2147483648
export MALLOC_TOP_PAD_ := 268435456
export MALLOC_MMAP_THRESHOLD_ := 1073741824

.PHONY: demo test lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/vlkd demo

# One process for each core, each with one thread; for a single file `pytest FILE` starts sooner.
test: export OMP_NUM_THREADS := 1
test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Found Python %d.%d, expected 3.11 or newer; run make PYTHON=python3.12." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	touch $@

# Editable, so that only a change of pyproject.toml asks for another installation.
$(VENV)/demo.stamp: $(VENV)/python.stamp pyproject.toml
	$(BIN)/python -m pip install --editable '.[demo]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/python.stamp pyproject.toml
	$(BIN)/python -m pip install --editable '.[demo,dev]'
	touch $@ $(VENV)/demo.stamp

clean:
	rm -rf $(VENV) build dist vlkd.egg-info .mypy_cache .pytest_cache .ruff_cache
