PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# pip compiles nothing ahead (torch alone has 2,500 modules), so each process must keep what it compiles for the next one
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check soak gpu clean

demo: $(VENV)/demo
	$(BIN)/diffsmooth certify fashion

test: $(VENV)/dev
	$(BIN)/pytest

check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

soak: $(VENV)/dev
	DIFFSMOOTH_FUZZ=5000 $(BIN)/pytest tests/test_hostile.py tests/test_fuzz.py -k fuzz
	for seed in 1 2 3 4 5; do $(BIN)/python -m tests.chaos --seed $$seed || exit 1; done
	for store in gs az; do $(BIN)/python -m tests.chaos --store $$store || exit 1; done

gpu: $(VENV)/dev # on a machine with a GPU
	$(BIN)/pytest tests/test_gpu.py
	$(BIN)/python -m benchmarks suite gpu --output gpu.json

$(VENV)/demo: EXTRAS :=
$(VENV)/dev: EXTRAS := [dev]
$(VENV)/demo $(VENV)/dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --editable '.$(EXTRAS)'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
