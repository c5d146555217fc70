# Every target sets up .venv on first use (Python >= 3.10 and a network for pip are all it needs).
# With an environment of your own, run the python commands below directly.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
FIRST_HALF := $(wildcard tests/test_[a-d]*.py)
SECOND_HALF := $(filter-out $(FIRST_HALF),$(wildcard tests/test_*.py))
DEMO := logs/aff_scl/market-synthetic-small/demo/seed0

.PHONY: demo test test-first-half test-second-half test-fast lint format bench gpu tables
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	$(PY) aff_scl/train.py --row demo --resume
	$(PY) aff_scl/test.py --checkpoint $(DEMO)
	$(PY) results/render.py aff_scl
	@echo "result file  runs/aff_scl/market-synthetic-small/demo/seed0.json"
	@echo "pictures     $(DEMO)/rank_list.png and cmc.png"
	@echo "page         open runs/index.html in a browser: all tables, curves and pictures"
	@$(PY) results/compare.py aff_scl/demo

# Two halves at once, each with one thread, since most tests wait for scripts of one thread; the second half prints its
# report when it ends.
test: $(VENV)/.ready
	@$(MAKE) --no-print-directory --keep-going --jobs=2 test-first-half test-second-half

test-first-half: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -q $(FIRST_HALF)

test-second-half: $(VENV)/.ready
	@report=$$(mktemp); OMP_NUM_THREADS=1 $(PY) -m pytest -q $(SECOND_HALF) > $$report 2>&1; status=$$?; \
	cat $$report; rm -f $$report; exit $$status

test-fast: $(VENV)/.ready
	$(PY) -m pytest -q -m "not slow"

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

bench: $(VENV)/.ready
	$(PY) tests/benchmarks/bench_evaluation.py
	$(PY) tests/benchmarks/bench_jaccard.py
	$(PY) tests/benchmarks/bench_data.py
	$(PY) tests/benchmarks/bench_usual.py

# Ten minutes on a machine with an NVIDIA GPU: the tests that need one, then the benchmarks, recorded and shown.
gpu: $(VENV)/.ready
	@status=0; $(PY) tests/benchmarks/gpu.py || status=$$?; \
	test $$status -gt 1 || $(PY) results/render.py > /dev/null; exit $$status

tables: $(VENV)/.ready
	$(PY) results/render.py

$(VENV)/.ready: requirements.txt tests/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || (echo "Python 3.10 or newer is needed: make PYTHON=python3.12"; exit 1)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
	@touch $@
