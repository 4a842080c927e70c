# make demo    train a small GPT with every optimizer here and torch's own; table, plot, JSON
# make test    the whole suite
# make test-large  more than 2^31 elements; needs 18 GB
# make bench   the benchmarks with their peers
# make lint    ruff, mypy, clang-format
# Each makes the environment .venv first and builds the package; nothing else is needed but Python and a C++ compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test test-large bench lint build clean
demo: $(VENV)/.demo build
	$(BIN)/python examples/train_gpt.py

test: $(VENV)/.test build
	$(BIN)/python tests/run.py

test-large: $(VENV)/.torch build
	$(BIN)/python tests/large.py

bench: $(VENV)/.bench build
	$(BIN)/python -m bench adamw
	$(BIN)/python -m bench blockwise_adam
	$(BIN)/python -m bench newton_schulz
	$(BIN)/python -m bench muon
	$(BIN)/python -m bench sinkhorn_knopp
	$(BIN)/python -m bench sinkhorn_newton_sparse

lint: $(VENV)/.dev $(VENV)/.test build
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

build: $(VENV)/.built

clean:
	rm -rf $(VENV) build dist demo_out python/fusedopt/*.so

$(VENV)/.venv: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fusedopt needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: apt install python3-venv"; exit 1; }
	$(PIP) install -q -c constraints.txt setuptools pybind11 cmake ninja numpy
	@touch $@

$(VENV)/.built: $(VENV)/.venv $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@

# torch first and alone: its CPU build satisfies whatever else asks for torch.
$(VENV)/.torch: $(VENV)/.venv
	$(PIP) install -q -c constraints.txt torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch
	$(PIP) install -q -c constraints.txt matplotlib rich tqdm scikit-learn POT
	@touch $@

# nvdisasm reads the kernels' machine code. Where there is no nvcc, the compiler comes from PyPI too.
CUDA_COMPILER := nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl
$(VENV)/.test: $(VENV)/.torch
	$(PIP) install -q -c constraints.txt pytest pytest-xdist hypothesis ml_dtypes expecttest triton matplotlib rich tqdm transformers scikit-learn
	$(PIP) install -q -c constraints.txt nvidia-cuda-nvdisasm
	@command -v nvcc >/dev/null || $(PIP) install -q -c constraints.txt $(CUDA_COMPILER)
	@touch $@

# deepspeed comes as a source that imports torch to build, and compiles its CPU Adam (minutes) at first use.
$(VENV)/.bench: $(VENV)/.torch
	$(PIP) install -q -c constraints.txt matplotlib rich bitsandbytes torchao regot POT geomloss ott-jax
	$(PIP) install -q -c constraints.txt --no-deps adam-mini pytorch_optimizer
	$(PIP) install -q -c constraints.txt einops hjson msgpack psutil py-cpuinfo pydantic tqdm packaging
	$(PIP) install -q -c constraints.txt --no-deps --no-build-isolation deepspeed
	@touch $@

$(VENV)/.dev: $(VENV)/.venv
	$(PIP) install -q -c constraints.txt ruff mypy clang-format build
	@touch $@
