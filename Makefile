# `make demo` watches a model learn, `make test` runs the tests. Both install what they need into .venv first;
# the next call starts at once. Another Python: `make demo PYTHON=python3.12`. `make chaos FAULTS=1000 SEEDS=100000`
# tries to make a run lose something. `make test INSTALL=--unconstrained` takes newer libraries than those of constraints/.

PYTHON ?= python3
RUN := .venv/bin/python
READY := .venv/ready
FAULTS ?= 200
SEEDS ?= 2000
INSTALL ?=
JOBS ?= 2
PYTEST := -m pytest -ra -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=25
TRAINER := .venv-trainer

.PHONY: demo test test-long test-all chaos check clean trainer-venv constraints constraints-cpu constraints-gpu constraints-trainer

demo: $(READY)
	@$(RUN) -m launch recipes/demo.toml --fresh

test: $(READY)
	@$(RUN) $(PYTEST) -m "not long"

# What `make test` leaves out.
test-long: $(READY)
	@$(RUN) $(PYTEST) -m long

test-all: test test-long

# Real processes under random faults, and simulated histories: as long as you like.
chaos: $(READY)
	@$(RUN) -m tests.chaos --faults $(FAULTS)
	@$(RUN) -m tests.simulation --seeds $(SEEDS)

check: $(READY)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(RUN) -m pyright  # without a look at PyPI for a newer one

# The trainer's environment of README's "Two environments"; tests/test_two_environments.py makes it, too.
trainer-venv:
	@$(PYTHON) install.py $(TRAINER) --for trainer $(INSTALL)

# The exact versions of constraints/, anew. Newer ones: `make clean`, `make test constraints INSTALL=--unconstrained`, and
# look at the difference. After a new line in pyproject.toml: `make constraints`.
constraints: constraints-cpu constraints-trainer constraints-gpu

constraints-cpu: $(READY)
	@$(RUN) -m constraints.renew cpu

constraints-trainer: trainer-venv
	@$(TRAINER)/bin/python -m constraints.renew trainer

# Without pip's configuration, which on a machine without a GPU may prefer CPU builds.
constraints-gpu: $(READY)
	@PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= $(RUN) -m constraints.renew gpu

clean:
	rm -rf .venv .venv-trainer build *.egg-info .pytest_cache .ruff_cache .hypothesis

# The file is written last, so that an interrupted installation goes on at the next call.
$(READY): pyproject.toml install.py $(wildcard constraints/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo 'make: "$(PYTHON)" is no Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) install.py .venv $(INSTALL)
	@touch $@
