# make demo    train a small network by local learning, in about two minutes
# make test    the whole test suite          (ARGS="tests/csrc -x" runs a part of it)
# make soak    every method killed at ten points and resumed, in full       (about ten minutes)
# make lint    ruff and mypy
# make gpu     all that needs a CUDA device: build, tests, sanitizer, benchmarks, with PYTHON and no venv (docs/gpu.md);
#              ARGS=--tune looks for launch configurations too
# make venv    only the environment that these use, in .venv
# make clean   remove what was built (.venv stays)

PYTHON ?= python3
VENV ?= .venv
TORCH := torch==2.13.0
JOBS ?= 2
ARGS ?=
OUT ?= runs/gpu
BUDGET ?= 540

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
LOCKED := $(VENV)/.locked
INSTALLED := $(VENV)/.installed

.PHONY: venv demo test soak lint gpu clean
.DELETE_ON_ERROR:

venv: $(INSTALLED)

# torch first and alone, then the lock without following dependencies: nothing can pull in another torch. A CUDA build
# of torch brings the triton that it was built with, and that one stays.
$(LOCKED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastlocal needs Python 3.11 or newer; name one with make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install $(TORCH)
	if $(BIN)/python -c 'import sys, importlib.util as u; sys.exit(u.find_spec("triton") is None)'; \
		then grep -v '^triton==' requirements.lock; else cat requirements.lock; fi > $(VENV)/requirements.txt
	$(PIP) install --no-deps -r $(VENV)/requirements.txt
	@touch $@

$(INSTALLED): $(LOCKED) pyproject.toml setup.py $(wildcard csrc/*)
	$(PIP) install --no-build-isolation --no-deps -e .
	@$(BIN)/python -c 'from fastlocal.engine import _native as n; print("fastlocal: native part", n.why_not() or "built")'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m fastlocal.bench.demo $(ARGS)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --timeout=300 $(ARGS)

soak: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.trainer.killed $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu:
	$(PYTHON) tests/gpu/run.py --out "$(OUT)" --budget $(BUDGET) $(ARGS)

clean:
	rm -rf build dist fastlocal.egg-info fastlocal/_native*.so $(INSTALLED) .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
