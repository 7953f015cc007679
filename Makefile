# `make demo` and `make test` are all the set-up there is: on a fresh machine each needs Python >= 3.10, a C++ compiler and a package
# index, makes the rest itself and says what it does. Run again, they redo only what a changed source asks for.
#   PYTHON=python3.12   the interpreter to use        VENV=.venv   where its environment goes
#   PYTEST_ARGS="-k paged"   passed to pytest         CMAKE_ARGS="-DPYRUNTIME_CUDA=OFF"   passed to CMake
#   PIP="uv pip"        another installer, which finds VENV as VIRTUAL_ENV
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Without a GPU in the machine the CUDA part is left out: it takes longest to compile, and nothing here could run it.
export CMAKE_ARGS ?= $(if $(wildcard /dev/nvidiactl),,-DPYRUNTIME_CUDA=OFF)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := CMakeLists.txt pyproject.toml $(wildcard cmake/*) $(shell find core models pyruntime bench/prt_bench -type f \
  \( -name '*.cc' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.map' -o -name '*.py' -o -name '*.toml' \))
PYTHON_FOLDERS := core models pyruntime tests bench docs/site $(wildcard examples)
C_SOURCES = $(shell find core bench $(wildcard examples) -type f \
  \( -name '*.c' -o -name '*.cc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' \) -not -name pyruntime.h)

.PHONY: help demo test lint format docs clean
help:
	@echo "make demo    build, install into $(VENV), fetch a small model (98 MB, once) and let it answer, also about a long text"
	@echo "make test    build, install into $(VENV) with what the tests need, and run every test"
	@echo "make lint    the checks of .ci/run that need no build: ruff, mypy, clang-format, the generated binding"
	@echo "make format  rewrite the sources as lint wants them"
	@echo "make docs    build the documentation site into build/site, from README.md, docs/, docstrings and the C header"
	@echo "make clean   remove $(VENV) and build/"

demo: $(VENV)/.installed
	@echo "== SmolLM2-135M answers a question (the model is fetched the first time, 98 MB)"
	$(BIN)/pyruntime run smollm2-135m --chat --temperature 0 --max-tokens 200 "Explain in three sentences why the sky is blue."
	@echo "== It reads 6000 tokens of the Jargon File once and answers from there, densely and with sparse attention (half a minute on two cores)"
	$(BIN)/pyruntime eval smollm2-135m --file tests/data/jargon-60k.txt --prompt-tokens 6000 --generate 64 \
	  --ask "What is verb doubling? Answer in one sentence." --attention tactic:p=0.9,tactic:p=0.75

# From tests/, and not as `python -m pytest`: the pyruntime/ of this folder has no library in it and must not be found first.
test: $(VENV)/.test
	@echo "== running the tests"
	cd tests && PATH="$(abspath $(BIN)):$$PATH" pytest -q $(PYTEST_ARGS)
	@echo "== running the tests of the GPU, if there is one"
	cd tests && PATH="$(abspath $(BIN)):$$PATH" pytest -q -m gpu -rf

# mypy sees the package as it is installed, with models/ inside.
lint: $(VENV)/.dev
	@echo "== checking the sources"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check $(PYTHON_FOLDERS)
	rm -rf build/typed && mkdir -p build/typed && cp -r pyruntime build/typed/ && cp -r models build/typed/pyruntime/
	cd build/typed && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache
	$(BIN)/python core/generate_abi.py --check
	$(BIN)/clang-format --dry-run -Werror --ferror-limit=10 $(C_SOURCES)

format: $(VENV)/.dev
	@echo "== formatting the sources"
	$(BIN)/python core/generate_abi.py
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format $(PYTHON_FOLDERS)
	$(BIN)/clang-format -i $(C_SOURCES)

# Strict: a dead link, a page outside the navigation or a docstring that is not found fails (with --quiet nothing would: what is not
# written is not counted). No network is used.
docs: $(VENV)/.docs
	@echo "== building the documentation into build/site"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf $(VENV) build

fail = { echo "error: $(1)" >&2; exit 1; }

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
	  $(call fail,$(PYTHON) was not found. Install Python 3.10 or newer or name yours: make PYTHON=/path/to/python3 $(MAKECMDGOALS))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  $(call fail,$(PYTHON) is $$($(PYTHON) --version) but 3.10 or newer is needed. Name another: make PYTHON=python3.12 $(MAKECMDGOALS))
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  $(call fail,$(PYTHON) has no venv module. Install it (Debian and Ubuntu: apt install python3-venv))
	@echo "== making a virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

# CMake and Ninja live in the environment too: with build isolation they would be fetched, and the build folder configured, each time.
$(VENV)/.tools: $(BIN)/python pyproject.toml
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  $(call fail,no C++ compiler was found. Install GCC 11 or newer (Debian and Ubuntu: apt install g++) or set CXX to yours)
	@echo "== fetching the build tools"
	$(PIP) install 'scikit-build-core>=0.10' 'cmake>=3.26' ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	@echo "== compiling and installing pyruntime into $(VENV) (the first time takes 3 minutes on two cores, several times that with CUDA; then only what changed)"
	$(PIP) install --no-build-isolation .
	@touch $@

# The package is installed already, so naming it only adds what the extra lists.
$(VENV)/.test: $(VENV)/.installed
	@echo "== installing what the tests need"
	$(PIP) install 'pyruntime[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	@echo "== installing the checkers"
	$(PIP) install 'pyruntime[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	@echo "== installing MkDocs"
	$(PIP) install 'pyruntime[docs]'
	@touch $@
