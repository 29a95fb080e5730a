# Every target builds its own virtual environment on first use; PYTHON picks the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint slow bench clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed  ## pre-train, quantize, test and report on real images
	OMP_NUM_THREADS=1 $(BIN)/inq-train  # 8x8 images leave nothing for a second thread to do

test: lint  ## lint, types and the default tests
	$(BIN)/pytest -n 2

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(VENV)/installed  ## the long tests
	$(BIN)/pytest -m slow

bench: $(VENV)/installed  ## what the callback costs, as ratios
	$(BIN)/python -m benchmarks.overhead

clean:
	rm -rf $(VENV) outputs multirun
