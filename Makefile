PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test soak check clean

demo: $(VENV)/installed
	$(BIN)/diffsmooth certify mnist

test: $(VENV)/installed
	$(BIN)/pytest

soak: $(VENV)/installed
	for seed in 1 2 3 4 5; do $(BIN)/python -m tests.chaos --seed $$seed || exit 1; done

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
