# Every target builds its own virtual environment on first use; PYTHON picks the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)
BIN := $(VENV)/bin

# Not in the lock, since no hash fits: torch is another file on each index, and brings other packages on each.
UNLOCKED := torch triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-, cublas cuda-cupti cuda-nvrtc \
	cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)

.PHONY: demo test lint slow gpu bench docs dist lock emulator clean

$(VENV)/installed: pyproject.toml constraints.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps --require-hashes --requirement requirements-dev.txt
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: $(VENV)/installed  ## pre-train, quantize, test and report on real images
	OMP_NUM_THREADS=1 $(BIN)/inq-train inq.activation_bits=8  # 8x8 images leave nothing for a second thread to do

test: lint  ## lint, types and the default tests
	@command -v qemu-riscv32 > /dev/null || echo "no RISC-V to run C on: its tests are skipped; make emulator installs it"
	$(BIN)/pytest -n 2 --dist worksteal  # neighbours share set-ups, so they stay together until one worker is idle

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(VENV)/installed  ## the long tests
	$(BIN)/pytest -m slow

emulator:  ## a RISC-V's compiler and emulator, from Debian or Ubuntu; without them its tests are skipped
	command -v riscv64-unknown-elf-gcc && command -v qemu-riscv32 || { $(SUDO) apt-get update && \
		$(SUDO) apt-get install --yes --no-install-recommends gcc-riscv64-unknown-elf qemu-user; }

gpu: $(VENV)/installed  ## what needs a CUDA GPU: the tests, what the callback costs there; skipped without one
	$(BIN)/pytest -m gpu
	$(BIN)/python -m benchmarks.overhead --device cuda

bench: $(VENV)/installed  ## what the callback costs, as ratios
	$(BIN)/python -m benchmarks.overhead

docs: $(VENV)/installed  ## the site, into site/
	$(BIN)/mkdocs build --strict

dist: $(VENV)/installed  ## what is uploaded to PyPI, into dist/
	$(BIN)/python -m build --no-isolation

lock: export UV_CUSTOM_COMPILE_COMMAND := make lock
lock:  ## pin and hash what pyproject.toml and constraints.txt ask for; needs uv; UPGRADE=--upgrade for the newest
	uv pip compile --quiet --universal --python-version 3.10 --extra dev --constraint constraints.txt --generate-hashes \
		$(addprefix --no-emit-package=, $(UNLOCKED)) $(UPGRADE) --output-file requirements-dev.txt pyproject.toml

clean:
	rm -rf $(VENV) outputs multirun site dist
