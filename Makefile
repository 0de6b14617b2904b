# The commands of everyday work. `make` alone lists them.

SHELL := /bin/bash
PYTHON := .venv/bin/python
# The server makes namespaces and mounts: root, or sudo.
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -E)
# As many test processes as there are cores; each has a server of its own.
WORKERS ?= logical
PYTEST := $(SUDO) $(PYTHON) -m pytest -p no:cacheprovider -n $(WORKERS) --maxprocesses=4 --dist=worksteal
PYTHONPATH_TESTS := PYTHONPATH=tests

.DEFAULT_GOAL := help
.PHONY: help demo setup setup-tests test test-fast test-docker test-container test-clients lint format bench clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: setup ## start a server, run the published client's quick start against it, stop, leave nothing
	@exec $(SUDO) $(PYTHON) build/demo.py

setup: ## install what the server needs, and .venv with the `hiver` command
	@build/setup.sh

setup-tests:
	@build/setup.sh --tests

test: setup-tests ## run all tests: unit, contract (published clients) and system (real sandboxes)
	@env $(PYTHONPATH_TESTS) $(PYTHON) -m support.clients
	@env $(PYTHONPATH_TESTS) $(PYTHON) -m support.object_services
	@exec $(PYTEST) tests

test-fast: setup-tests ## the same without the tests that take minutes
	@env $(PYTHONPATH_TESTS) $(PYTHON) -m support.clients
	@env $(PYTHONPATH_TESTS) $(PYTHON) -m support.object_services
	@exec $(PYTEST) -m "not slow" tests

test-docker: setup-tests ## every test that has a server, on Docker Engine
	@env $(PYTHONPATH_TESTS) $(PYTHON) -m support.clients
	@env $(PYTHONPATH_TESTS) $(PYTHON) -m support.object_services
	@exec $(PYTEST) --backend=docker tests/contract tests/system

test-container: setup-tests ## build the container image and use the server in it; takes minutes, and wants mmdebstrap
	@exec $(SUDO) $(PYTHON) build/container/try.py

test-clients: setup-tests ## the contract tests with every published release of the client
	@env HIVER_TEST_CLIENTS=all $(PYTHONPATH_TESTS) $(PYTHON) -m support.clients
	@exec env HIVER_TEST_CLIENTS=all $(PYTEST) tests/contract

lint: setup ## ruff, mypy, import-linter and shell syntax
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m mypy tests/support tests/contract tests/bench tests/conftest.py build/demo.py
	$(PYTHON) -m mypy build/container/try.py
	.venv/bin/lint-imports --no-logo
	bash -n build/setup.sh build/container/run.sh .ci/run

format: setup ## let ruff format and mend what it can
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

bench: setup-tests ## measure against bare tools and print a table; .build/bench.json has the numbers
	@exec $(SUDO) env $(PYTHONPATH_TESTS) $(PYTHON) -m bench

clean: ## remove .venv, clients, caches and build results
	rm -rf .venv .clients .build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
