# make demo | test | lint | verify-tensorrt: each creates what it needs, a virtual environment in the tree first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Where there is no GPU any CPU build of torch will do; with one, the CUDA build that Triton 3.6 belongs to.
TORCH  ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch==2.11.0 || echo torch==2.13.0)
READY  := $(VENV)/.ready
DEMO   := bundles/jet-tiny-fp8-inductor

.PHONY: demo test lint types docs clean verify-tensorrt

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install -q --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/jet-export build --model jet-tiny --fp8
	$(BIN)/jet-export verify $(DEMO)
	$(BIN)/jet-export generate $(DEMO) --prompt "def "

# Every rung on this machine, with jet-tiny or BUNDLE=DIR. HEADERS=--fetch-headers where TensorRT's are not installed.
verify-tensorrt: $(READY)
	$(BIN)/jet-export verify --ladder $(BUNDLE) $(HEADERS)

# All tests, or TESTS=tests/kernels.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadscope --no-loadscope-reorder $(TESTS)

# mypy wants modules where they are imported from, so everything is linked there: kernels/, model/ and plugins/ under
# jet_export/, the tests' helpers and the scripts, whose names must differ, at the top.
TESTED := $(filter-out $(CURDIR)/tests/helpers $(CURDIR)/tests/data,$(wildcard $(CURDIR)/tests/*))
types: $(READY)
	rm -rf build/types && mkdir -p build/types/jet_export build/types/tests
	ln -s $(CURDIR)/jet_export/* $(CURDIR)/kernels $(CURDIR)/model $(CURDIR)/plugins build/types/jet_export/
	ln -s $(TESTED) build/types/tests/
	ln -s $(CURDIR)/tests/helpers $(CURDIR)/benchmarks/*/*.py $(CURDIR)/examples/*.py $(CURDIR)/examples/jet_tiny build/types/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir ../mypy .
	cd build/types && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports --no-cache $(CURDIR)/pyproject.toml

lint: $(READY) types docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The documentation as a site, in build/site; a warning is an error. `$(BIN)/mkdocs serve` shows it while one writes.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) build bundles *.egg-info
