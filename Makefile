# Two commands matter:
#   make study   sets up .venv, trains the smoke study and writes reports/smoke/report.html
#   make test    the same set-up, then every check: notebooks, tests, and the wheel in a second environment
#   make test-all  the same with the tests marked slow: more combinations of what `make test` covers
# One that takes an hour or two: make equality (the exported file against the training graph, all combinations; goes on where it was interrupted).
# The others: setup, browser, check, notebooks, unit, wheel, readme, lock, clean, distclean.
#
# PYTHON=/path/to/python3   the interpreter to build .venv from (default: the first of the list below that is 3.10 or newer)
# JOBS=2                    runs of the study at the same time
# KEEP=1                    keep the wheel test's environment (.venv-wheel)
#
# Every path here is relative, so that a checkout may lie in a folder whose name has blanks.

SHELL := /bin/bash
PYTHON ?= auto
JOBS ?= 2
BIN := .venv/bin
PY := $(BIN)/python
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable

# A .venv that was copied or moved from another folder points to where it came from: make it anew.
MOVED := $(shell [ -e .venv/.ready ] && [ "$$(sed -n 1p .venv/.ready)" != "$$(pwd)" ] && echo rebuild)

# What the environment is made from. The stamp holds its checksum: nbdev and git touch these files without changing them.
MADE_FROM := cat settings.ini constraints.txt setup.py pyproject.toml | cksum
STALE := $(shell [ -e .venv/.ready ] && [ "$$(sed -n 2p .venv/.ready)" != "$$($(MADE_FROM))" ] && echo refresh)

# What a test sees: the tools of .venv first, one thread a process (two processes at a time).
TESTENV := PATH="$$PWD/$(BIN):$$PATH" OMP_NUM_THREADS=1

.PHONY: study equality setup test test-all browser check notebooks unit wheel readme lock clean distclean rebuild refresh
.DEFAULT_GOAL := study

study: setup
	@$(BIN)/qisal study --profile smoke --out reports/smoke --jobs $(JOBS)

# EQUALITY: archs can be split among several makes; the last, with all of them, gathers the rows.
EQUALITY := archs='small_cnn,lenet5,resnet20', bits='2,4,4/2,w2a4,w4a2,8', quantizers='sawb,sawb_zero,dorefa', scales='tensor,channel', \
  sample=False, steps=30, n_test=10_000, n_numpy=10_000, n_exact=2_000, out='reports/equality'
equality: setup
	@mkdir -p reports/equality
	@OMP_NUM_THREADS=1 $(PY) -c "import json; from qisal.core import write_atomic; from qisal.run import fill_notebook; \
	  nb = fill_notebook('nbs/81_equality.ipynb', dict($(EQUALITY)), '.', True); \
	  write_atomic('reports/equality/equality.ipynb', json.dumps(nb, indent=1, ensure_ascii=False) + chr(10))"

setup: .venv/.ready
	@:

# The stamp is written last. `.installing` stands while pip works: an installation that was cut off is started over.
# Of two makes at once the second waits for the first (where there is `flock`).
.venv/.ready: $(MOVED) $(STALE)
	@set -e; \
	if command -v flock >/dev/null; then \
	  exec 9<Makefile; flock -n 9 || { echo "Another make is setting up .venv; waiting for it."; flock 9; }; \
	  if [ "$$(cat .venv/.ready 2>/dev/null)" = "$$(pwd; $(MADE_FROM))" ]; then exit 0; fi; \
	fi; \
	if [ -e .venv/.installing ] || [ -n "$(MOVED)" ]; then echo "Starting .venv over."; rm -rf .venv; fi; \
	if [ ! -x $(PY) ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  found=; \
	  for p in $$([ "$(PYTHON)" = auto ] && echo python3 python3.13 python3.12 python3.11 python3.10); do \
	    if command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then found=$$p; break; fi; \
	  done; \
	  if [ "$(PYTHON)" != auto ] && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then found="$(PYTHON)"; fi; \
	  if [ -z "$$found" ]; then \
	    echo "qisal needs Python 3.10 or newer; $$( [ "$(PYTHON)" = auto ] && echo 'no such python3 is on the PATH' || echo 'PYTHON=$(PYTHON) is not one'). Install it, or name it: make PYTHON=/path/to/python3" >&2; exit 1; \
	  fi; \
	  rm -rf .venv; \
	  "$$found" -m venv .venv || { rm -rf .venv; echo "Could not make .venv. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	fi; \
	echo "Installing the locked environment into .venv (the first time: a few minutes, 6 GB)."; \
	touch .venv/.installing; \
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt torch torchvision -e '.[dev]' \
	  || { echo "The installation failed (see above); 'make' starts it over." >&2; exit 1; }; \
	{ pwd; $(MADE_FROM); } > .venv/.ready.part; rm .venv/.installing; mv .venv/.ready.part .venv/.ready

rebuild refresh:

# The report is looked at in a real browser, driven by chromedriver. As root on Debian both are fetched; elsewhere they must be there.
browser:
	@have() { command -v chromedriver >/dev/null && for b in $(BROWSERS); do command -v $$b >/dev/null && return 0; done; return 1; }; \
	have && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing chromium and chromedriver for the test of the report."; \
	  export DEBIAN_FRONTEND=noninteractive; { apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null 2>&1 \
	    || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; }; } \
	  && have && exit 0; \
	fi; \
	echo "The tests look at the report in a browser: install chromedriver and chromium or google-chrome and run make again (looked for: chromedriver, $(BROWSERS))." >&2; exit 1

# One pytest at the end, so that its summary is the last thing to read. The wheel is its last test.
test: setup browser notebooks
	@$(TESTENV) $(PY) tests/checkout.py $(PY) -m pytest tests -m 'not slow'

test-all: setup browser notebooks
	@$(TESTENV) $(PY) tests/checkout.py $(PY) -m pytest tests

check: setup
	@$(TESTENV) $(PY) -m pytest tests/test_notebooks.py tests/test_packaging.py

notebooks: setup
	@echo "nbdev_test: every notebook from top to bottom"
	@$(TESTENV) $(PY) tests/checkout.py $(BIN)/nbdev_test --n_workers 2 --do_print --timing

unit: setup browser
	@$(TESTENV) $(PY) -m pytest tests -m 'not slow' --ignore tests/test_wheel.py

wheel: setup
	@$(TESTENV) $(PY) -m pytest tests/test_wheel.py

readme: setup
	@$(PY) tests/readme.py

# Locks what `make setup` installs, for every Python from 3.10 on; versions that are locked already stay where they can.
# `rm constraints.txt` first to move everything to the newest.
lock:
	@rm -rf .venv-lock && python3 -m venv .venv-lock && .venv-lock/bin/python -m pip install -q uv \
	  && .venv-lock/bin/python tests/lock.py; s=$$?; rm -rf .venv-lock; exit $$s

clean:
	rm -rf build dist *.egg-info .pytest_cache .venv-wheel .venv-lock reports/smoke
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
