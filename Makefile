# Everything a contributor or a CI server runs. It needs make and Python 3.11; the rest goes into .venv/.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test testdata results data lint docs bench lock clean

# The Python that makes the environment: 3.11, because allensdk's pins (numpy 1.23, pandas 1.5) end there.
# PYTHON=/path/to/python3.11 names one; otherwise the first of these that is 3.11 is taken.
CANDIDATES := $(or $(PYTHON),python3.11 python3 python)
# Where to look for torch besides PyPI. On Linux without an NVIDIA GPU, the CPU build saves gigabytes:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# The one version chosen by hand; `make lock` finds versions of everything else around it.
TORCH := 2.13.0
# Extra options for `make lock`: LOCK_OPTIONS=--upgrade takes the newest versions.
LOCK_OPTIONS ?=

# Notebooks for `make results`; default: all that hold slow cells.
ONLY ?=

BIN := .venv/bin
PYTEST = $(BIN)/pytest -q -n 2 --dist worksteal
READY := .venv/.ready
export VIRTUAL_ENV := $(CURDIR)/.venv

# Downloads. A lab's shared data folder beside its checkouts is used when it is there; otherwise the
# library's own default, a cache folder in the user's home.
LAB_DATA := $(CURDIR)/../shared/data
ifeq ($(origin CORTEXLIT_DATA),undefined)
ifneq ($(wildcard $(LAB_DATA)/.),)
export CORTEXLIT_DATA := $(abspath $(LAB_DATA))
endif
endif

# $(call step,TITLE,COMMAND): announce, run, and say how long it took. COMMAND holds no comma.
define step
@echo "==> $(1)"; SECONDS=0; \
if $(2); then echo "    ok ($$SECONDS s)"; \
else echo "    FAILED after $$SECONDS s: $(1)"; exit 1; fi
endef

help: ## Show this list
	@echo "make TARGET, with one of:"
	@sed -nE 's/^([a-z]+):.*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

setup: $(READY) ## Make .venv with the pinned versions (the other targets do this by themselves)

$(READY): settings.ini setup.py constraints.txt
	@python=; for candidate in $(CANDIDATES); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; \
	    then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "No Python 3.11 found (tried: $(CANDIDATES))."; \
	    echo "  Debian, Ubuntu:  sudo apt install python3.11 python3.11-venv   (or the deadsnakes PPA)"; \
	    echo "  macOS:           brew install python@3.11"; \
	    echo "  anywhere:        uv python install 3.11, or pyenv install 3.11, or conda create -n py311 python=3.11"; \
	    echo "Then: make setup PYTHON=/path/to/python3.11"; \
	    exit 1; \
	fi; \
	echo "==> environment in .venv ($$("$$python" --version), a few minutes the first time)"; \
	test -x $(BIN)/python || "$$python" -m venv .venv
	@# torch by pip, which knows about local wheels and TORCH_INDEX; uv, far faster, does the rest.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt torch uv
	@$(BIN)/uv pip install --quiet --compile-bytecode --refresh-package cortexlit -e '.[dev]' -c constraints.txt
	@# pynwb keeps what it read with one hdmf, and cannot be imported with another: it makes this file anew.
	@rm -f .venv/lib/python3.11/site-packages/pynwb/core_typemap.pkl
	@touch $@

# The targets below run notebooks and tests two at a time, with one thread each.
demo test testdata results: export OMP_NUM_THREADS := 1
# Compiled modules are kept, whatever the surroundings say: every worker and every kernel would compile them anew.
demo test testdata results: export PYTHONDONTWRITEBYTECODE :=
# Large arrays are kept and used again; glibc would give each back to the system, which zeroes it anew at every step.
demo test testdata results: export MALLOC_TRIM_THRESHOLD_ := 1000000000
demo test testdata results: export MALLOC_MMAP_THRESHOLD_ := 1000000000
demo test testdata results: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
test testdata: export CORTEXLIT_SCALE := demo

demo: setup ## Run the studies on the embedded session; pages and scores go to _demo/
	@$(BIN)/python tools/loopback.py
	@$(BIN)/python tools/demo.py --out _demo

# Fast checks first, so that a slip is reported after seconds.
test: setup ## Check everything: sync, pages and links, tests, all notebooks
	@$(BIN)/python tools/loopback.py
	$(call step,1 of 3: library and notebooks agree; notebooks are clean,$(BIN)/python tools/check_sync.py)
	$(call step,2 of 3: tests,$(PYTEST))
	$(call step,3 of 3: notebooks run from top to bottom; pages and links of the site,$(BIN)/python tools/run_notebooks.py --site)

testdata: setup ## Check what reads real files (see data): these tests, and the notebooks with such cells
	$(call step,1 of 2: tests that read real files,$(PYTEST) -m data)
	$(call step,2 of 2: notebooks with cells that read real files,$(BIN)/python tools/run_notebooks.py --holding data)

results: setup ## Make the stored results of notebooks with slow cells anew (hours; ONLY='path ...' for some)
	@$(BIN)/python tools/run_notebooks.py --holding slow --flags slow $(ONLY)

data: setup ## Fetch the real files that some notebook cells and tests read (6 MB)
	@$(BIN)/cortexlit data --fetch

lint: setup ## Check style: ruff over notebooks, tests, tools and benchmarks
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

docs: setup ## Build and check the pages in _proc/; with Quarto installed, the site in _docs/
	@$(BIN)/python tools/check_docs.py
	@if command -v quarto >/dev/null; then \
	    rm -rf _docs && quarto render _proc --no-cache && mv _proc/_docs _docs && $(BIN)/python tools/check_docs.py --site _docs; \
	else echo "Quarto is not installed (https://quarto.org): pages checked, site not rendered."; fi

bench: setup ## Time the library against its references, one JSON per benchmark
	@mkdir -p benchmarks/results
	@for script in benchmarks/bench_*.py; do \
	    name=$$(basename "$$script" .py); echo "==> $$name"; \
	    $(BIN)/python "$$script" --out "benchmarks/results/$$name.json"; \
	done
	@$(BIN)/python tools/bench_table.py benchmarks/results/*.json

.PHONY: torture
torture: setup ## Kill and damage what the library does, for a quarter of an hour, and count what is lost (Linux)
	@OMP_NUM_THREADS=1 $(BIN)/python tools/torture.py --minutes 15 --out neuro_nbs/results/torture.json

# Resolved for all platforms at once. No index is named: the same file serves CPU and CUDA builds of torch.
lock: setup ## Renew constraints.txt after a change of the requirements in settings.ini
	@echo 'torch==$(TORCH)' | $(BIN)/uv pip compile setup.py - --refresh-package cortexlit --extra dev --python-version 3.11 --universal \
	    --no-annotate --custom-compile-command 'make lock' --quiet $(LOCK_OPTIONS) -o constraints.txt
	@echo "constraints.txt: $$(grep -c == constraints.txt) packages"

clean: ## Remove what can be made again (.venv and the results in _runs/ stay)
	rm -rf _data _demo _docs _proc nbdev.yml build dist .pytest_cache .hypothesis .ruff_cache .quarto
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf
