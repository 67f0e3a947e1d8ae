# Every target sets up what it needs; `make help` lists them.
# The tools are found relative to this file, so run make from the root of the repository.

PYTHON ?= python3
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
ARGS ?=
# The transformers besides the recorded newest that the API tests are run with, the oldest first. Each has a file of
# versions, tools/transformers-<minor>.txt; the oldest is the floor in pyproject.toml.
OLDER := 5.17 5.23
# Other people's implementations, each with a file of versions, tools/peers-<name>.txt
PEERS := kvpress openvino
# `make record TORCH=2.15.0` moves on to another torch; otherwise the recorded one stays
TORCH ?= $(shell sed -n 's/^torch==//p' tools/constraints.txt)

# Text from the user reaches the shell through the environment, unexpanded: quotes, spaces and $ arrive as typed.
override IMAGE := $(value IMAGE)
override QUESTION := $(value QUESTION)
override MODEL := $(value MODEL)
export IMAGE QUESTION MODEL

# The tests download nothing, and each of the $(JOBS) workers has one thread. Tests that share a build share a worker, and
# start in the order of collection, the slow first, rather than by the size of their group.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder --benchmark-disable
# what OpenBLAS, oneDNN and ATen choose on a CPU without AVX-512
AVX2 := OPENBLAS_CORETYPE=Haswell ATEN_CPU_CAPABILITY=avx2 DNNL_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
AVX2_TESTS := $(addprefix tests/kernels/,package/test_interpreter.py score/test_score_tokens.py prune/test_score_select.py)
AVX2_TESTS += $(addprefix tests/kernels/decode/,test_attend_slots.py test_score_from_lse.py)
# those where the order of a sum matters
AVX2_TESTS += -k "interpreter or reference or batch or masks or padding or accurate"

.DEFAULT_GOAL := help
.PHONY: demo test $(OLDER:%=test-%) test-floor test-avx2 test-static test-next environments record record-peers peers test-lmms bench gate ptx gpu lint format docs clean help

demo: .venv/.ready  ## answer a question about an image with and without pruning: IMAGE=… QUESTION=… MODEL=…
	@.venv/bin/python -m bench.demo $${IMAGE:+--image="$$IMAGE"} $${QUESTION:+--question="$$QUESTION"} $${MODEL:+--model="$$MODEL"}

test: .venv/.ready  ## the test suite on the recorded versions, machine code apart: ARGS="-k gather", JOBS=2
	$(TEST_ENV) .venv/bin/python $(PYTEST) --ignore=tests/static --ignore=tests/ptx $(ARGS)

test-static: .venv/.ready  ## a sample of the kernels' machine code against the baseline; a few compiled kernels emulated
	$(TEST_ENV) .venv/bin/python $(PYTEST) tests/static tests/ptx $(ARGS)

ptx: .venv/.ready  ## run every compiled kernel on an emulated GPU, with weak memory and planted faults: ARGS="-k counts"
	$(TEST_ENV) .venv/bin/python $(PYTEST) tests/ptx -m "emulates_all or not emulates_all" $(ARGS)

$(OLDER:%=test-%): test-%: .venv-%/.ready
	$(TEST_ENV) .venv-$*/bin/python $(PYTEST) tests/api $(ARGS)

test-5.23:  ## the API tests on transformers 5.23

test-floor: test-$(firstword $(OLDER))  ## the API tests on the oldest transformers (the kernels do not import it)

test-avx2: .venv/.ready  ## chosen kernel tests with the arithmetic of a CPU without AVX-512
	$(AVX2) $(TEST_ENV) .venv/bin/python $(PYTEST) $(AVX2_TESTS) $(ARGS)

environments: .venv/.ready $(OLDER:%=.venv-%/.ready)  ## set up what the tests run in, the older transformers too

test-next:  ## the whole suite on the newest of everything, whatever the record says
	$(PYTHON) tools/setup_env.py .venv-next newest
	@$(PYTHON) tools/recorded.py compare .venv-next
	$(TEST_ENV) .venv-next/bin/python $(PYTEST) $(ARGS)

record:  ## record the newest versions; torch stays as it is, or TORCH=2.15.0
	rm -rf .venv-record
	$(PYTHON) tools/setup_env.py .venv-record newest "torch==$(TORCH)"
	$(PYTHON) tools/recorded.py write .venv-record
	rm -rf .venv-record-docs
	$(PYTHON) tools/setup_env.py .venv-record-docs newest-docs
	$(PYTHON) tools/recorded.py write-docs .venv-record-docs

record-peers: .venv/.ready  ## record what the peers of `make peers` need beside .venv
	$(PYTHON) tools/recorded.py write-peers .venv

peers: .venv/.ready $(PEERS:%=.venv-peer-%/.ready)  ## our methods beside other people's implementations: ARGS=kvpress
	$(TEST_ENV) PYTHONPATH=.:python_api .venv/bin/python -m bench.peers $(ARGS)

test-lmms: .venv/.ready .venv-peer-lmms-eval/.ready  ## the plug-in for lmms-eval, run by it on drawn pages
	$(TEST_ENV) .venv-peer-lmms-eval/bin/python -m pytest --benchmark-disable tests/lmms $(ARGS)

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

docs: .venv-docs/.ready  ## the documentation, into build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --clean $(ARGS)
	@echo "build/site/index.html"

clean:  ## remove the environments and everything built or cached
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@sed -n 's/^\([a-z0-9.-]*\):.*## /\1|/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "make %-13s %s\n", $$1, $$2 }'

SET_UP := tools/setup_env.py tools/recorded.py

.venv/.ready: pyproject.toml setup.py tools/constraints.txt $(SET_UP)
	$(PYTHON) tools/setup_env.py .venv
	@touch $@

.venv-docs/.ready: pyproject.toml tools/docs.txt $(SET_UP)
	$(PYTHON) tools/setup_env.py .venv-docs docs
	@touch $@

.venv-peer-%/.ready: .venv/.ready tools/peers-%.txt $(SET_UP)
	$(PYTHON) tools/setup_env.py .venv-peer-$* peer-$*
	@touch $@

.venv-%/.ready: .venv/.ready tools/transformers-%.txt $(SET_UP)
	$(PYTHON) tools/setup_env.py .venv-$* $*
	@touch $@
