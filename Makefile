# make demo    from nothing to a finished sweep
# make test    all tests but those on a real cluster
# make test-oldest    the demo and the main guarantees on the oldest versions in pyproject.toml
# make test-cluster   those: hosts on this machine, which needs root
# make cluster-check  what is wrong with a cluster file (FILE=cluster.yaml)
# make docs    build the documentation site into site/
# make bench   measure what we claim about speed, into benchmarks/results/
# make check   lint, types and tests, as before a commit
# make clean   removes .venv and caches; runs/ and data/ are never touched
#
# PYTHON=python3.12 chooses the interpreter of .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1
export PIP_REQUIRE_VIRTUALENV = 0

.PHONY: help demo docs bench test test-oldest test-cluster cluster-check lint types check format clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# What is run lands in this directory, whatever SDA_RAY_ROOT says: it may hold precious data.
demo: export SDA_RAY_ROOT = $(CURDIR)
demo: .venv/installed
	$(BIN)/sda-ray simulate --preset demo
	$(BIN)/sda-ray sweep sweeps/demo.py

# A warning, such as of a broken link, is an error. The theme's note about its own future is none.
docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/installed-dev
	$(BIN)/python -m mkdocs build --quiet --strict
	@! grep -rlE '<(script|img|link)[^>]* (src|href)="?https?:' --include='*.html' site || { \
	    echo 'These pages load something from the internet.'; exit 1; }

bench: .venv/installed-dev
	$(BIN)/python benchmarks/bench.py $(ARGS)

test: .venv/installed-dev
	$(BIN)/python -m pytest $(ARGS)

# Reading and resuming runs, a resume after SIGKILL, promotion, and the sampler.
OLDEST := tests/test_earlier_files.py tests/search/test_pruners.py tests/sweep/test_launch.py
OLDEST_ONLY := earlier_files or pruners or killed_and_extended or ends_with_all_runs

test-oldest: .venv-oldest/installed
	rm -rf .venv-oldest/root
	.venv-oldest/bin/sda-ray simulate --preset demo --root .venv-oldest/root
	.venv-oldest/bin/sda-ray sweep sweeps/demo.py --root .venv-oldest/root
	.venv-oldest/bin/python -m pytest $(OLDEST) -k "$(OLDEST_ONLY)" $(ARGS)

# Hosts with their own network, disk and sshd, on which Ray is launched as on machines of a lab,
# and what needs the dashboard of ray[default].
test-cluster: .venv/installed-dev .venv/installed-cluster
	tests/multihost/prepare
	$(BIN)/python -m pytest --override-ini addopts=-ra --numprocesses 2 --dist loadfile --timeout 2400 \
	    tests/multihost tests/cluster/test_nodes.py $(ARGS)

cluster-check: FILE ?= cluster.yaml
cluster-check: .venv/installed-cluster
	@$(BIN)/python -m sda_ray.cluster.clusterfile $(FILE) && echo "$(FILE): fine"

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/installed-dev
	$(BIN)/mypy

check: lint types test

format: .venv/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv .venv-oldest build site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find sda_ray sweeps tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is made after everything is installed: an interrupted installation is done again.
.venv/installed: .venv/created pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	@touch $@

.venv/installed-cluster: .venv/installed
	$(PIP) --editable '.[cluster]'
	@touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --no-compile --constraint constraints-oldest.txt \
	    --editable '.[test]'
	@touch $@

.venv/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "sda_ray needs Python 3.10 or later, but '$(PYTHON)' is older or missing." \
	        "Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv --clear .venv || { \
	    echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@touch $@
