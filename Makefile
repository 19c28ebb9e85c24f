# These do all their own set-up: `make demo`, `make test`, `make test-engines` and `make test-verl`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Published problems for the grading tests; see docs/grading.md. Without them those tests are skipped.
export CAPO_DATA_DIR

VERL   := .venv-verl

.PHONY: demo test test-engines test-fast test-verl lint docs docs-serve format clean

# torch 2.13.0 goes first, from whatever index pip is set up with: one of CPU builds pulls in no CUDA package.
# DeepSpeed's own kernels are not built; ZeRO needs none.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[trl,deepspeed,lab,tasks,docs,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/capo demo --output runs/demo

test: $(STAMP) lint
	$(BIN)/python -m pytest -n 2 -m "not engine"

# Two processes on DDP, FSDP2, ZeRO-2 and ZeRO-3; Triton's kernels, interpreted and compiled.
test-engines: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m engine

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow"

# verl and TRL want different transformers: an environment of its own. Torch goes first here as well.
$(VERL)/.installed: pyproject.toml constraints-verl.txt
	test -x $(VERL)/bin/python || $(PYTHON) -m venv $(VERL)
	$(VERL)/bin/python -m pip install --quiet --upgrade pip
	$(VERL)/bin/python -m pip install --quiet torch==2.13.0
	$(VERL)/bin/python -m pip install --quiet --constraint constraints-verl.txt --editable '.[verl]' \
	  pytest pytest-timeout
	touch $@

# Two gloo processes under torchrun, two workers under Ray; some ten minutes on two idle cores.
test-verl: $(VERL)/.installed
	$(VERL)/bin/python -m pytest tests/verl_engine

# The site, in build/site; any warning is an error. The variable silences the theme's advertisement.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VERL) runs build dist .pytest_cache .mypy_cache .ruff_cache
