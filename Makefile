# `make` lists the targets. Each sets up what it needs: Python 3.11 or newer with venv and pip is all that must be there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
# Two workers with one thread each, unless told otherwise: faster on two cores than one worker with two threads.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test check setup format golden bench kernel-report bench-formats bench-quality bench-planner clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 20

demo: $(READY)  ## train a small GPT on two ranks with compressed activations, and compare
	$(BIN)/fxpipe demo

test: $(READY)  ## run the tests
	$(BIN)/pytest -n $(WORKERS)

check: $(READY)  ## style, format and types
	BIN=$(BIN) tools/check.sh

setup: $(READY)  ## create .venv with fxpipe, its extras and the developer tools

format: $(READY)  ## sort the imports and format every file
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

golden: $(READY)  ## write the golden files of the tests anew
	$(BIN)/pytest --golden tests/plans/test_page.py tests/passes/test_every_pass.py

# Each prints a table and JSON, as ratios of one run, and fails where a figure falls short. They want a quiet machine.
bench: $(READY)  ## measure speed, memory and exactness against their figures
	for bench in compile cpu step exactness pipeline prediction saved_bytes; do $(BIN)/python tools/bench_$$bench.py --check || failed=1; done; exit $${failed:-0}

kernel-report: $(READY)  ## count what the Triton kernels compile to, and fail where one misses its budget
	$(BIN)/python tools/kernel_report.py --check

bench-formats: $(READY)  ## signal to noise of every kind of format, beside others and the limit, against their figures; lossless codings
	$(BIN)/python tools/bench_formats.py --check
	$(BIN)/python tools/bench_lossless.py

bench-quality: $(READY)  ## gradients of whole models, and training, with compressed saves, against their figures
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_quality.py --check

bench-planner: $(READY)  ## measure how good and how quick the planner is (about twelve minutes)
	for bench in planner pipedream prediction; do OMP_NUM_THREADS=1 $(BIN)/python tools/bench_$$bench.py --check || failed=1; done; exit $${failed:-0}

clean:  ## remove .venv and every cache
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Made anew when what is to be installed changes; editable, so that the sources here are what runs.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fxpipe needs Python 3.11 or newer; this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[hf,dev]'
	@touch $(READY)
