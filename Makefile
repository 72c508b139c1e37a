# make demo | test | lint | verify-tensorrt: each creates what it needs, a virtual environment in the tree first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Where there is no GPU any CPU build of torch will do; with one, the CUDA build that Triton 3.6 belongs to.
TORCH  ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch==2.11.0 || echo torch==2.13.0)
READY  := $(VENV)/.ready
DEMO   := bundles/jet-tiny-fp8-inductor
LOAD   := build/load

.PHONY: audit cluster demo families fuzz oldest load test lint types docs constraints clean verify-tensorrt

# pip would compile 28,000 files one after the other.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install -q --no-compile --disable-pip-version-check -e ".[dev]"
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
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

# The fuzz tests with FACTOR times as many examples as CI looks at, at other values each time.
FACTOR ?= 100
fuzz: $(READY)
	JET_FUZZ=$(FACTOR) $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --timeout=0 tests/fuzz $(TESTS)

# All of Ray's tests, those that CI leaves out too.
cluster: $(READY)
	JET_CLUSTER=1 $(BIN)/python -m pytest -p no:xdist tests/server/ray tests/search/test_ray_search.py $(TESTS)

# A small Qwen3.5 through build --mtp, verify, try and search, compiled for the CPU: minutes.
families: $(READY)
	JET_FAMILIES=1 $(BIN)/python -m pytest -p no:xdist --timeout=0 tests/test_families.py tests/backends/inductor/test_mtp.py $(TESTS)

# A few tests with the oldest versions that pyproject.toml allows, laid over the environment; torch, Triton and numpy are
# PYTHON_OLDEST's: one with torch 2.11 and Triton 3.6 tests those too.
OLDEST        := build/oldest
PYTHON_OLDEST ?= $(BIN)/python
CUDA_PACKAGES := triton numpy setuptools cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti \
	cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)
oldest: $(OLDEST)/.ready
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(PYTHON_OLDEST) -m pytest -q -p no:xdist tests/utils/test_schema.py tests/bundle/test_manifest.py \
		tests/model/test_config.py tests/model/test_qwen.py tests/fuzz/test_side_files.py

$(OLDEST)/.ready: pyproject.toml | $(READY)
	rm -rf $(OLDEST)
	$(BIN)/pip install -q --disable-pip-version-check uv
	echo 'transformers>=5' | $(BIN)/uv pip compile pyproject.toml - --resolution lowest-direct --python-version 3.11 --quiet \
		--no-annotate --no-header --no-emit-package torch $(addprefix --no-emit-package ,$(CUDA_PACKAGES)) -o build/oldest.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $(OLDEST) -r build/oldest.txt
	touch $@

# Known vulnerabilities of what is installed of pyproject.toml's dependencies: pip-audit, in an environment of its own, asks PyPI.
audit: $(READY)
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install -q --disable-pip-version-check pip-audit
	$(BIN)/python -c 'import re, tomllib, importlib.metadata as m; \
	    names = [re.match(r"[\w-]+", d)[0] for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]]; \
	    print(*(f"{n}=={m.version(n).partition(chr(43))[0]}" for n in names), sep="\n")' > build/audit.txt
	build/audit/bin/pip-audit --strict --disable-pip --no-deps -r build/audit.txt

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

# constraints.txt: the tested set, with hashes, for Python 3.11 on Linux x86-64. torch and the CUDA libraries that it brings
# are left out: which build is the user's choice. Versions that are installed here are kept (uv: pip install uv).
CUDA := cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 \
	cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)
constraints: $(READY)
	$(BIN)/pip install -q --disable-pip-version-check uv
	$(BIN)/pip freeze --exclude-editable | grep -v '^torch=\| @ ' > build/installed.txt
	$(BIN)/uv pip compile pyproject.toml --extra dev --python-version 3.11.7 --python-platform x86_64-manylinux_2_35 \
		--generate-hashes --no-annotate --custom-compile-command "make constraints" -c build/installed.txt \
		$(addprefix --no-emit-package ,torch $(CUDA)) --quiet -o constraints.txt

# AIPerf (the extra `load`, more than 1 GB) in an environment of its own: 8 streams against jet-tiny, or BUNDLE=DIR.
load: $(READY) $(LOAD)/.ready
	test -d $(or $(BUNDLE),$(DEMO)) || $(BIN)/jet-export build --model jet-tiny --fp8
	$(BIN)/python benchmarks/serving/aiperf_load.py $(or $(BUNDLE),$(DEMO)) --aiperf $(LOAD)/bin/aiperf

$(LOAD)/.ready: pyproject.toml
	$(PYTHON) -m venv $(LOAD)
	$(LOAD)/bin/pip install -q --disable-pip-version-check $$($(BIN)/python -c 'import tomllib; \
	    print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["load"])')
	touch $@

clean:
	rm -rf $(VENV) build bundles *.egg-info
