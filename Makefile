# make build | test | demo | asan | lint | bench | clean
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
C_FILES := $(shell find csrc -name '*.c' -o -name '*.h' -o -name '*.def')

.PHONY: build test demo asan lint bench clean
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
	$(PY) -m pytest

clean:
	rm -rf $(VENV) build *.egg-info promoe/*.so
