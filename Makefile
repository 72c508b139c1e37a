# make demo | test | lint | verify-tensorrt: each creates what it needs, a virtual environment in the tree first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Where there is no GPU any CPU build of torch will do; with one, the CUDA build that Triton 3.6 belongs to.
TORCH  ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch==2.11.0 || echo torch==2.13.0)
READY  := $(VENV)/.ready
DEMO   := bundles/jet-tiny-fp8-inductor

.PHONY: demo test lint types clean verify-tensorrt

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
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadscope $(TESTS)

# mypy wants the packages where they are imported from, so kernels/, model/ and plugins/ are linked under jet_export/.
types: $(READY)
	rm -rf build/types && mkdir -p build/types/jet_export
	ln -s $(CURDIR)/jet_export/* $(CURDIR)/kernels $(CURDIR)/model $(CURDIR)/plugins build/types/jet_export/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p jet_export

lint: $(READY) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build bundles *.egg-info
