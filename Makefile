# make build | test | demo | asan | numpy1 | lint | format | bench | clean
# CUDA: make build-cuda (needs nvcc) | test-cuda (needs neither nvcc nor a GPU) | gpu-test | gpu-sanitize | gpu-bench
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
C_FILES := $(shell find csrc -name '*.c' -o -name '*.h' -o -name '*.def')

# The CUDA library is a target of its own here; pip install builds it by PROMOE_CUDA (setup.py).
export PROMOE_CUDA ?= 0

.PHONY: build test demo asan numpy1 lint format bench clean build-cuda test-cuda gpu-test gpu-sanitize gpu-bench
build: $(VENV)/built

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo 'make: python3 has no venv: install python3-venv'; exit 1; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || { echo 'make: Python.h is missing: install python3-dev'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check 'setuptools>=77' wheel 'numpy>=2.0' safetensors tqdm pytest Pillow matplotlib scikit-learn
	touch $@

$(VENV)/built: $(VENV)/ready setup.py $(C_FILES)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

test: build
	$(PY) -m pytest --ignore=tests/cuda

$(VENV)/cuda: $(VENV)/ready
	$(PY) kernels/build.py --find >/dev/null 2>&1 || $(PY) -m pip install --quiet --disable-pip-version-check 'nvidia-cublas>=13,<14'
	touch $@

# promoe/_cuda.so, and what ptxas says of every kernel. One file alone: make build-cuda KERNEL=linear
build-cuda: $(VENV)/cuda
	$(PY) kernels/build.py $(if $(KERNEL),--only $(KERNEL),--resources benchmarks/results/cuda-kernels.json)

# The kernels on the CPU, every thread a fibre: the tests of the ops on device="cuda-on-cpu", then those of
# the backend. A part of it: make test-cuda PYTEST="-k linear"
test-cuda: build
	PROMOE_TEST_DEVICE=cuda-on-cpu $(PY) -m pytest -q tests/ops tests/binding/test_contract.py $(PYTEST)
	$(PY) -m pytest -q tests/cuda $(PYTEST)

# On a machine with an NVIDIA GPU, after make build-cuda: each works for 8 minutes at most, goes on where the last call ended,
# and writes one file of benchmarks/results/. GPU="--official PATH" measures the public code, too.
gpu-test gpu-sanitize gpu-bench: build
	$(PY) -m benchmarks.gpu $(@:gpu-%=%) $(GPU)

# Trains a small ProMoE on handwritten digits and judges its samples: runs/demo. A run that was stopped is
# continued; after a finished one the pictures and figures are made anew (rm -r runs/demo to train again).
BEGAN := $(shell date +%s)
demo: build
	$(PY) -m promoe.demo --since $(BEGAN)

# The suite on a copy of the tree, built with the address and undefined-behaviour sanitizers. CPython
# leaks on purpose, so leaks are left to tests/binding/test_module.py; libstdc++ is there for
# matplotlib's exceptions. A part of it: make asan PYTEST=tests/binding
ASAN := build/asan
asan: build
	rm -rf $(ASAN) && mkdir -p $(ASAN)
	cp -rp csrc kernels promoe tests benchmarks examples docs pyproject.toml setup.py Makefile *.md LICENSE $(ASAN)/
	rm -f $(ASAN)/promoe/*.so
	cd $(ASAN) && PROMOE_CFLAGS='-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined' \
		PROMOE_LDFLAGS='-fsanitize=address,undefined' $(CURDIR)/$(PY) setup.py --quiet build_ext --inplace
	cd $(ASAN) && LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=16 \
		UBSAN_OPTIONS=print_stacktrace=1 \
		$(CURDIR)/$(PY) -m pytest --capture=sys -p no:cacheprovider -q $(PYTEST)

# One build serves NumPy 1 and 2: the extension of .venv (built with NumPy 2), run with NumPy 1.26.
NUMPY1 := build/numpy1
numpy1: build
	test -d $(NUMPY1)/venv || $(PYTHON) -m venv $(NUMPY1)/venv
	$(NUMPY1)/venv/bin/python -m pip install --quiet --disable-pip-version-check 'numpy==1.26.*' safetensors tqdm pytest Pillow 'matplotlib<3.11' scikit-learn
	PYTHONPATH=$(CURDIR) $(NUMPY1)/venv/bin/python -m pytest -p no:cacheprovider -q $(PYTEST)

$(VENV)/linters: $(VENV)/ready
	$(PY) -m pip install --quiet --disable-pip-version-check 'clang-format==18.1.8' 'ruff==0.17.6'
	touch $@

FORMATTED = $(shell git ls-files 'csrc/*.c' 'csrc/*.h' 'kernels/*.cu' 'kernels/*.cuh')
lint: build $(VENV)/linters
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)
	$(VENV)/bin/ruff check .
	PROMOE_CFLAGS=-Werror $(PY) setup.py --quiet build_ext --force --build-lib build/lint --build-temp build/lint

format: $(VENV)/linters
	$(VENV)/bin/clang-format -i $(FORMATTED)
	$(VENV)/bin/ruff check --fix .

$(VENV)/bench: $(VENV)/ready
	$(PY) -m pip install --quiet --disable-pip-version-check 'pytest-benchmark>=4.0'
	touch $@

# Every op and a step of ProMoE-S beside the peaks of this machine -> benchmarks/results/. All that the README shows: BENCH=--final
bench: build $(VENV)/bench
	$(PY) -m benchmarks $(BENCH)

clean:
	rm -rf $(VENV) build *.egg-info promoe/*.so
