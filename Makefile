# The two commands of the README. Each makes what it needs on a fresh machine (Python >= 3.10 and a C++ compiler) and says what it does.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find core models pyruntime -type f -not -path '*/__pycache__/*') CMakeLists.txt pyproject.toml

.PHONY: demo test clean
demo: $(VENV)/.installed
	@echo "== asking SmolLM2-135M (fetched once, 98 MB) a question"
	$(BIN)/pyruntime run smollm2-135m --chat --temperature 0 --max-tokens 200 "Explain in three sentences why the sky is blue."

test: $(VENV)/.tested
	@echo "== running all tests"
	$(BIN)/python -m pytest -q

$(BIN)/python:
	@echo "== making a virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

# Re-run only when a source has changed; the build folder is kept, so a rebuild is incremental.
$(VENV)/.installed: $(BIN)/python $(SOURCES)
	@echo "== building and installing pyruntime (the first time takes about 3 minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check .
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	@echo "== installing what the tests need"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build
