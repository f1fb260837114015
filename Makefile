# make quickstart   from nothing to a trained model and a report      make test   every test
# Both set up .venv by themselves, once; again where requirements.txt, pyproject.toml or the place of this folder change.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# make test TESTS="tests/launch -k plan"
TESTS ?=
# make mutants MUTANTS="--modules schedule --sample 50"
MUTANTS ?=
# make quickstart FIGURES=figures.json: where the measured figures go
FIGURES ?= quickstart/figures.json

.PHONY: help setup test curve mutants mutants-sample slurm-setup test-slurm-core test-slurm soak soak-kill quickstart clean FORCE

help:
	@echo 'make quickstart   set up, fetch the demo data, train the preset tiny on 2 ranks, evaluate, write a report'
	@echo 'make test         set up, run every test'
	@echo 'make curve        train 30 steps of tiny and compare them with the frozen loss curve (a minute; docs/testing.md)'
	@echo 'make mutants      small defects in the numeric core, one at a time: does a test fail? (hours; docs/mutants.md)'
	@echo 'make mutants-sample   those of them that fit into three minutes'
	@echo 'make test-slurm   runs on a real Slurm cluster of 12 hosts on this machine (root; first: make slurm-setup)'
	@echo 'make test-slurm-core   the four scenarios of it that every push runs'
	@echo 'make slurm-setup  install Slurm from packages of Debian or Ubuntu (root); starts no service'
	@echo 'make soak         faults, kills and memory of data at full size: 10 million rows, 5,000 addresses (an hour)'
	@echo 'make soak-kill    kill a small run at 100 random moments and at every write point'
	@echo 'make setup        only make .venv, with the packages of requirements.txt and the command .venv/bin/limoe'
	@echo 'make clean        remove .venv and quickstart/'
	@echo 'PYTHON=python3.12 names the Python that .venv is made from (3.11 or newer)'

setup: $(STAMP)

# An environment knows its own path: one that was copied or moved here is made anew.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

$(STAMP): requirements.txt pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo 'limoe: $(PYTHON) was not found: sudo apt install python3 python3-venv' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'limoe: $(PYTHON) is older than Python 3.11: sudo apt install python3.11 python3.11-venv,' \
		'then make PYTHON=python3.11' >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "limoe: $(PYTHON) cannot make environments: sudo apt install" \
		"$$("$(PYTHON)" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; exit 1; }
	@echo 'setting up $(VENV): a few minutes, most of them downloads'
	@rm -f $(STAMP)
	"$(PYTHON)" -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q -r requirements.txt
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q --no-deps -e .
	@printf '%s\n' '$(CURDIR)' > $(STAMP)

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --ignore=tests/slurm $(TESTS)

curve: $(STAMP)
	$(VENV)/bin/python -m tests.curve compare

mutants: $(STAMP)
	$(VENV)/bin/python -m tests.mutants --out docs/measured/mutants.json $(MUTANTS)

mutants-sample: $(STAMP)
	$(VENV)/bin/python -m tests.mutants --no-check --seed 1 --budget-s 170 --floor 0.8

slurm-setup:
	tests/slurm/cluster install --mpi

test-slurm-core: $(STAMP)
	$(VENV)/bin/python -m pytest tests/slurm -m core -n 3 --dist worksteal

test-slurm: $(STAMP)
	$(VENV)/bin/python -m pytest tests/slurm -n 4 --dist worksteal

soak-kill: $(STAMP)
	$(VENV)/bin/python -m tests.soak.kill --out docs/measured/soak_kill.json

# The short ones first: a fault shows early.
SOAKS := download_faults resume loader_memory pack_kill pack_memory list_memory
soak: $(STAMP)
	set -e; for name in $(SOAKS); do \
		echo "== $$name"; $(VENV)/bin/python -m tests.soak.$$name --out docs/measured/$$name.json; done

quickstart:
	@start=$$(date +%s) && $(MAKE) --no-print-directory setup && end=$$(date +%s) && \
		$(VENV)/bin/python -m launch.quickstart --setup-seconds $$((end - start)) --figures '$(FIGURES)'

clean:
	rm -rf $(VENV) quickstart
