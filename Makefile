# Every target sets up what it needs; `make help` lists them.
# The tools are found relative to this file, so run make from the root of the repository.

PYTHON ?= python3
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
ARGS ?=
# the oldest transformers that the whole API suite is run with
FLOOR := transformers==5.17.0

# Text from the user reaches the shell through the environment, unexpanded: quotes, spaces and $ arrive as typed.
override IMAGE := $(value IMAGE)
override QUESTION := $(value QUESTION)
override MODEL := $(value MODEL)
export IMAGE QUESTION MODEL

# The tests download nothing, and each of the $(JOBS) workers has one thread.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := -m pytest -n $(JOBS) --benchmark-disable

.DEFAULT_GOAL := help
.PHONY: demo test test-floor bench gate gpu lint format clean help

demo: .venv/.ready  ## answer a question about an image with and without pruning: IMAGE=… QUESTION=… MODEL=…
	@.venv/bin/python -m bench.demo $${IMAGE:+--image="$$IMAGE"} $${QUESTION:+--question="$$QUESTION"} $${MODEL:+--model="$$MODEL"}

test: .venv/.ready  ## the whole test suite on the newest transformers: ARGS="-k gather", JOBS=2
	$(TEST_ENV) .venv/bin/python $(PYTEST) $(ARGS)

test-floor: .venv-floor/.ready  ## the API tests on the oldest transformers (the kernels do not import it)
	$(TEST_ENV) .venv-floor/bin/python $(PYTEST) tests/api $(ARGS)

bench: .venv/.ready  ## the benchmarks of single operations: ARGS="-k gather"
	.venv/bin/python -m pytest bench --benchmark-only $(ARGS)

gate: .venv/.ready  ## machine code of all kernels for all architectures against the baseline: ARGS="--update"
	PYTHONPATH=. .venv/bin/python tests/static/baseline.py $(ARGS)

# A machine whose python3 has a CUDA torch needs no set-up, hence no network; any other gets .venv.
gpu:  ## everything that a GPU should prove, in one command
	@test -f bench/gpu.py || { echo "make gpu: bench/gpu.py is missing" >&2; exit 2; }
	@if $(PYTHON) tools/setup_env.py --has-cuda; then python=$(PYTHON); else $(MAKE) -s .venv/.ready && python=.venv/bin/python; fi && \
	set -x && PYTHONPATH=.:python_api $$python bench/gpu.py $(ARGS)

lint: .venv/.ready  ## ruff and mypy
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

format: .venv/.ready  ## let ruff mend what it can
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

clean:  ## remove the environments and everything built or cached
	rm -rf .venv .venv-floor build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "make %-11s %s\n", $$1, $$2 }'

.venv/.ready: pyproject.toml setup.py tools/setup_env.py
	$(PYTHON) tools/setup_env.py .venv
	@touch $@

.venv-floor/.ready: pyproject.toml setup.py tools/setup_env.py Makefile
	$(PYTHON) tools/setup_env.py .venv-floor "$(FLOOR)"
	@touch $@
