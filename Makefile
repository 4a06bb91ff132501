# Everything a newcomer needs: `make demo`. Everything a contributor needs: `make check test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
EXTRAS := dev,fonts,photos,sql,web
OLDEST ?= python3.11
NEWEST ?= python3.13
# Two processes of one thread each: half the time of one process with two threads.
TEST   := OMP_NUM_THREADS=1 PYTEST_ADDOPTS='-n 2'

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-floors test-newest test-wheel test-crash test-pretrained check fix docs bench bench-gpu clean

help:   ## list the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

setup: $(READY)  ## make .venv and install mmalign with everything it needs (about 6 GB)

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; ok = (3, 11) <= v <= (3, 13); sys.exit(None if ok else "mmalign needs Python 3.11 to 3.13; this is %d.%d. Name another: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $(READY)
	@echo 'Done. To use the command mmalign here:  . $(VENV)/bin/activate'

demo: $(READY)  ## draw scenes, train, embed, index and search them: five minutes on two cores
	$(BIN)/mmalign demo --out demo

test: $(READY)  ## run the tests, in two processes
	$(TEST) $(BIN)/python -m pytest

test-fast: $(READY)  ## the tests that are quick, in one minute: while you work
	$(TEST) $(BIN)/python -m pytest -m "not slow"

test-floors:  ## run the tests with the lowest versions that setup.cfg allows (another 6 GB)
	$(OLDEST) -m venv .venv-floors
	$(OLDEST) tests/helpers/floors.py > .venv-floors/floors.txt
	.venv-floors/bin/pip install --quiet -c .venv-floors/floors.txt -e '.[$(EXTRAS)]'
	$(TEST) .venv-floors/bin/python -m pytest

test-newest:  ## run the tests with the newest versions that setup.cfg allows (another 6 GB)
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade -e '.[$(EXTRAS)]'
	$(TEST) .venv-newest/bin/python -m pytest

test-wheel: $(READY)  ## build the wheel, install it alone, and run the examples with it from another folder
	rm -rf build
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps -w build/wheel .
	$(BIN)/python -m venv build/env
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > build/tested.pth
	cp build/tested.pth "$$(build/env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	build/env/bin/pip install --quiet --disable-pip-version-check --no-deps build/wheel/*.whl
	cd build && env/bin/python -c 'import mmalign, mmalign.index as i; assert "/env/" in mmalign.__file__ and "/env/" in i.__file__, i.__file__'
	cd build && env/bin/mmalign --version
	cd build && env/bin/python -m pytest -q -c ../setup.cfg --rootdir .. ../tests/test_examples.py

docs: $(READY)  ## write the API reference from docstrings to build/api
	$(BIN)/python docs/api.py build/api

test-crash: $(READY)  ## kill writers at every operation of the disk and at random: hours
	MMALIGN_CRASH=full $(BIN)/python -m pytest -q tests/store/test_crash*.py

test-pretrained: $(READY)  ## compare every name of open_clip's list with open_clip: minutes
	MMALIGN_ALL_PRETRAINED=1 $(BIN)/python -m pytest -q tests/model/test_pretrained.py

check: $(READY)  ## ruff, mypy strict and the room test; never writes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_rooms.py

fix: $(READY)  ## format, and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## run the benchmarks; rows go to bench/results
	$(BIN)/python -m bench

# Nothing is installed: a machine with a GPU brings its own torch.
bench-gpu: GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
bench-gpu:  ## the GPU tests and benchmarks on one card; no network, no set-up
	$(GPU_PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "bench-gpu needs a GPU that torch can use")'
	$(GPU_PYTHON) -m pytest -q --noconftest tests/kernels/test_losses.py tests/kernels/test_topk.py tests/kernels/test_parts.py
	$(GPU_PYTHON) -m bench loss
	$(GPU_PYTHON) -m bench topk

clean:  ## remove the environment, caches and the demo
	rm -rf $(VENV) .venv-floors .venv-newest demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
