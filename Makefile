# Everything a newcomer or CI runs. `make` lists the targets.
PRESET ?= demo
VENV ?= .venv
ARGS ?=
# A Python is found by running it: pyenv's shims exist for versions that do not.
FIND_PYTHON = for python in python3.11 python3.12 python3 python "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[12].*/bin/python; do \
	"$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 && echo "$$python" && break; done
PYTHON ?= $(shell $(FIND_PYTHON))
RUN = $(VENV)/bin/python
STAMP = $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check raises mutants soak gpu gpu-wheels bench-peers compat clean

help:  ## List the targets
	@echo "make demo    with PRESET=$(PRESET); ARGS=... are passed on; VENV=$(VENV) is made when needed."
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

demo: $(STAMP)  ## From raw data to pictures and a report: the main job on embedded data (PRESET=tiny takes about a minute)
	@$(RUN) launcher.py demo $(PRESET) $(ARGS)

test: $(STAMP)  ## The test suite on all cores (ARGS="-k storage" selects, ARGS="-n 0" takes one process)
	@$(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(STAMP)  ## Style, formatting, types and the direction of imports
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) -m pytest -q --durations=0 tests/repository/test_imports.py
	@$(RUN) -m tests.support.import_graph

raises: $(STAMP)  ## The tests under coverage: every raise must be reached by one
	@$(RUN) .ci/raises.py $(ARGS)

mutants: $(STAMP)  ## Plant small faults and list those that no test sees (hours; goes on where it was; ARGS="--jobs 4 --only trainer")
	@nice -n 5 $(RUN) .ci/mutants.py $(ARGS)

soak: $(STAMP)  ## Long fault and training runs
	@$(call selected,soak)

gpu:  ## What only a GPU can show: one script for a machine that may be bare and offline, under nine minutes (ARGS="--device cpu" rehearses it)
	@"$$([ -x "$(RUN)" ] && echo "$(RUN)" || echo python3)" .ci/gpu.py $(ARGS)

gpu-wheels:  ## Fill the folder wheels/, from which `make gpu` takes what a machine without a network lacks (ARGS="--python 3.12": that machine's)
	@"$$([ -x "$(RUN)" ] && echo "$(RUN)" || echo python3)" .ci/gpu_wheels.py $(ARGS)

bench-peers: $(STAMP)  ## Benchmarks that compare with other projects, which are installed beside the environment
	@"$(RUN)" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv-peers -r requirements-peers.txt
	@PYTHONPATH=.venv-peers "$(RUN)" launcher.py bench data-images $(ARGS)
	@PYTHONPATH=.venv-peers "$(RUN)" launcher.py bench model $(ARGS)
	@PYTHONPATH=.venv-peers "$(RUN)" launcher.py bench sample $(ARGS)

compat: $(STAMP)  ## The tests with the lowest and the highest supported versions (two environments, about 20 minutes)
	@$(RUN) .ci/compat.py $(ARGS)

clean:  ## Remove the environment and caches; runs/ stays
	rm -rf $(VENV) .venv-peers .mypy_cache .ruff_cache .pytest_cache

# pytest ends with 5 when no test is selected.
selected = $(RUN) -m pytest -m $(1) --timeout=0 $(ARGS); code=$$?; \
	if [ $$code -eq 5 ]; then echo "$(1): no test is marked '$(1)' in this selection; nothing to do."; exit 0; fi; exit $$code

# The stamp comes last, and .installing marks an environment that an interrupted installation left in an unknown state.
$(STAMP): requirements.txt requirements-dev.txt requirements-tools.txt constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 with venv was found. Debian 12: apt install python3-venv. Ubuntu 24.04: apt install python3-venv."; \
	echo "Elsewhere: pyenv install 3.12. Or name one: make PYTHON=/path/to/python3.12"; exit 1; }
	@if [ -e "$(VENV)/.installing" ]; then rm -rf "$(VENV)"; fi
	@"$(PYTHON)" -m venv "$(VENV)" && touch "$(VENV)/.installing"
	@echo "Installing into $(VENV) with $$("$(RUN)" --version): about 4 minutes and 7 GB (PyTorch's CUDA build; 2 GB with a CPU build)."
	@"$(RUN)" -m pip install --quiet --disable-pip-version-check --no-input -r requirements.txt -r requirements-dev.txt -c constraints.txt
	@"$(RUN)" -m pip install --quiet --disable-pip-version-check --no-input --no-deps -r requirements-tools.txt -c constraints.txt
	@rm "$(VENV)/.installing" && touch "$(STAMP)"
