# Every target sets up what it needs in .venv; PYTHON picks the interpreter, ARGS goes to the command run.
# A CPU-only torch is smaller: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test

PYTHON ?= $(firstword $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p; done))
VENV := .venv
BIN := $(VENV)/bin
FOLDERS := compiler passes codegen runtime
ARGS ?=

# `make dev` leaves this mark: from then on the install is a tree of links, which a new file makes stale
STRICT := $(wildcard $(VENV)/.strict)
LISTED := $(if $(STRICT),llmopt $(FOLDERS))
KEY := $(shell { cat pyproject.toml; test -z "$(LISTED)" || find $(LISTED) -type f ! -name '*.pyc' | LC_ALL=C sort; } \
	| cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.installed-$(KEY)

# one worker a core, each on one thread: two pools of spinning OpenMP threads on the same cores cost far more than they give
JOBS ?= $(shell nproc 2>/dev/null || echo 1)
CPU_LANE := not gpu and not multigpu and not interp and not xcompile

.PHONY: help install demo test gpu dev lint types bench clean

help:
	@echo "make demo | test | gpu | bench | lint | dev | clean"

install: $(INSTALLED)

$(INSTALLED): | $(BIN)/python
	@echo "installing llmopt and its dependencies into $(VENV)"
	@$(BIN)/pip install -q --disable-pip-version-check -e ".[dev]" $(if $(STRICT),--config-settings editable_mode=strict)
	@rm -f $(VENV)/.installed-* && touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "llmopt needs Python 3.11 or newer: install it, or give PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)

demo: install
	@$(BIN)/python examples/demo.py $(ARGS)

# the lanes `interp` and `xcompile` need processes of their own (tests of one file share models, so a file stays whole);
# 5 is pytest's "no tests collected"
test: install
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) -m "$(CPU_LANE)" $(ARGS)
	@for lane in interp xcompile; do \
		grep -rqE "pytest\.mark\.$$lane\b" tests --include='*.py' || continue; \
		[ $$lane = interp ] && set -- 1 loadfile || set -- 0 load; \
		OMP_NUM_THREADS=1 TRITON_INTERPRET=$$1 $(BIN)/pytest -n $(JOBS) --dist $$2 -m $$lane \
			$(ARGS) || [ $$? -eq 5 ] || exit 1; \
	done

# on the machine's own GPUs, one test after the other; tests that want more GPUs than there are are skipped
gpu: install
	@$(BIN)/pytest -m "gpu or multigpu" $(ARGS) || [ $$? -eq 5 ]

# the form of install that editors and type checkers can follow, and the hooks; with it, python started in this
# folder needs -P (the folder llmopt/ here would hide the installed package, whose other parts lie elsewhere)
dev: $(BIN)/python
	@touch $(VENV)/.strict
	@$(MAKE) --no-print-directory install
	@if [ -d .git ]; then $(BIN)/pre-commit install; fi

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

# mypy does not read package-dir, so it looks at the packages where they are installed: below llmopt
types: install
	@rm -rf build/types && mkdir -p build/types/llmopt
	@for folder in $(FOLDERS); do ln -s "../../../$$folder" build/types/llmopt/; done
	@for file in llmopt/*; do ln -s "../../../$$file" build/types/llmopt/; done
	@python=$$PWD/$(BIN)/python; cd build/types && "$$python" -m mypy --config-file ../../pyproject.toml -p llmopt

bench: install
	@for script in benchmarks/[!_]*.py; do $(BIN)/python $$script $(ARGS) || exit 1; done

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
