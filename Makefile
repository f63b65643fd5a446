# make quickstart   the main job, from nothing to a plot
# make test         the tests
# make lint         style, types, and who may import whom
# make bench        attention: time and memory by scheme and length
# make docs         the documentation, as a site in site/
#
# All of them first make .venv and install the locked packages; PYTHON=... picks another Python, VENV=... another place.

VENV ?= .venv
CANDIDATES = $(PYTHON) python3.12 python3.11 python3 python
RUN = $(VENV)/bin/python
export MUJOCO_GL ?= disabled

.PHONY: quickstart test test-slow lint bench docs lock
.DELETE_ON_ERROR:

quickstart: $(VENV)/installed
	$(RUN) -m agents.sweep configs/quickstart.toml

test: $(VENV)/installed
	$(RUN) -m pytest -m "not slow" --numprocesses 2 --dist worksteal

test-slow: $(VENV)/installed
	$(RUN) -m pytest -m slow --numprocesses 2 --dist worksteal

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/pyrefly check --python-interpreter-path $(RUN)
	$(VENV)/bin/lint-imports

bench: $(VENV)/installed
	$(RUN) -m rlring.bench

docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# A Python of the supported range: asked by running it, because a name on the PATH may be a shim for nothing.
$(VENV)/installed: requirements.lock pyproject.toml
	@for python in $(CANDIDATES); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
	    found="$$python"; break; fi; done; \
	if [ -z "$$found" ]; then \
	  echo "error: rlring needs Python 3.11 or 3.12 with venv (dm-control's labmaze has no wheels for others); none of: $(CANDIDATES). Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; fi; \
	echo "installing into $(VENV) with $$("$$found" --version)"; \
	"$$found" -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --require-hashes -r requirements.lock
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/docs-installed: $(VENV)/installed docs/requirements.lock
	$(RUN) -m pip install --quiet --require-hashes -r docs/requirements.lock
	@touch $@

# Needs uv: python -m pip install uv
LOCK = uv pip compile --universal --python-version 3.11 --no-emit-index-url --no-header --no-annotate --generate-hashes pyproject.toml
lock:
	$(LOCK) --extra stack --extra test --extra build --output-file requirements.lock
	$(LOCK) --extra docs --constraints requirements.lock --output-file docs/requirements.lock
	sed -i '1i # Pinned for Python 3.11 and 3.12. Made by `make lock` from pyproject.toml.' requirements.lock docs/requirements.lock
