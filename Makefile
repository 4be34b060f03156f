# Two commands are all a newcomer needs: `make demo` and `make test`.

PYTHON ?= python3
# numpy 1.26, which the bundled Triton's Python backend needs, has wheels up to Python 3.12.
TRITON_PYTHON ?= $(shell for p in $(PYTHON) python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
PIP = python -m pip --disable-pip-version-check --quiet install --require-hashes
VENV = .venv
TRITON_VENV = .venv-triton
TRAINING_VENV = .venv-training
ANSIBLE_VENV = .venv-ansible
UV ?= uv

.DEFAULT_GOAL := help
.PHONY: help setup demo test quick test-deploy lint conformance lock lock-training model evaluate clean

help: ## Show the commands
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.appliance $(TRITON_VENV)/.ready ## Build both environments

demo: ## Start everything, scan two patients, show the alert (STUDY=folder sends your own)
	@PYTHON="$(PYTHON)" TRITON_PYTHON="$(TRITON_PYTHON)" sh requirements/system.sh demo
	@$(MAKE) --no-print-directory setup
	@$(VENV)/bin/scanside demo $(if $(STUDY),--study "$(STUDY)")

test: ## Run every check
	@PYTHON="$(PYTHON)" TRITON_PYTHON="$(TRITON_PYTHON)" sh requirements/system.sh test
	@$(MAKE) --no-print-directory $(VENV)/.test $(TRITON_VENV)/.ready lint
	$(VENV)/bin/pytest -n 2 --dist loadgroup -m "not deploy" $(PYTEST)

quick: $(VENV)/.test ## Run the everyday tests: no peers, nothing slow
	$(VENV)/bin/pytest -n 2 --dist loadgroup -m "not interop and not slow and not gpu and not deploy" $(PYTEST)

test-deploy: ## Boot machines with systemd, install them from a bundle, break them (as root)
	@PYTHON="$(PYTHON)" TRITON_PYTHON="$(TRITON_PYTHON)" sh requirements/system.sh deploy
	@$(MAKE) --no-print-directory $(VENV)/.test $(TRITON_VENV)/.ready $(ANSIBLE_VENV)/.ready
	$(VENV)/bin/pytest -n 2 --dist loadgroup -m deploy $(PYTEST)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

conformance: $(VENV)/.test ## Write the tables of docs/conformance.md from the code's own
	$(VENV)/bin/python -m appliance.conformance docs/conformance.md

lock: ## Renew the hashed requirement files (needs uv)
	$(UV) pip compile $(LOCK) pyproject.toml requirements/build.in -o requirements/appliance.txt
	$(UV) pip compile $(LOCK) --extra gpu -c requirements/appliance.txt pyproject.toml requirements/build.in -o requirements/gpu.txt
	$(UV) pip compile $(LOCK) --extra test --extra gpu -c requirements/gpu.txt pyproject.toml requirements/build.in -o requirements/test.txt
	$(UV) pip compile $(LOCK) --no-deps requirements/triton.in -o requirements/triton.txt
	$(UV) pip compile $(LOCK) requirements/ansible.in -o requirements/ansible.txt
	$(UV) pip compile $(LOCK) requirements/install.in -o requirements/install.txt
LOCK = --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url \
	--no-emit-find-links --custom-compile-command "make lock"

lock-training: ## Renew requirements/training.txt (uv must find torch's CPU build: UV_FIND_LINKS)
	$(UV) pip compile $(filter-out --universal,$(LOCK)) -c requirements/appliance.txt requirements/training.in -o requirements/training.txt

model: $(TRAINING_VENV)/.ready ## Train the reference model again (an hour and a half; resumes where it was stopped)
	ORT_DISABLE_TELEMETRY=1 $(TRAINING_VENV)/bin/python -m triton_models.training.train --out triton_models/ich_reference $(TRAIN)

evaluate: $(VENV)/.appliance $(TRITON_VENV)/.ready ## Measure the reference model, write docs/model (an hour, 17 GB; resumes)
	$(VENV)/bin/python -m triton_models.training.evaluate $(EVALUATE)

clean: ## Remove the environments and what the demo made
	rm -rf $(VENV) $(TRITON_VENV) $(TRAINING_VENV) $(ANSIBLE_VENV) build demo .cache .mypy_cache .pytest_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "scanside needs Python 3.11 or newer; set PYTHON=")'
	@PYTHON="$(PYTHON)" TRITON_PYTHON="$(TRITON_PYTHON)" sh requirements/system.sh venv
	$(PYTHON) -m venv $(VENV)

$(VENV)/.appliance: requirements/appliance.txt pyproject.toml | $(VENV)/bin/python
	@echo "scanside: building $(VENV) (first time: a minute or two)"
	$(VENV)/bin/$(PIP) -r requirements/appliance.txt
	$(VENV)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.test: requirements/test.txt $(VENV)/.appliance
	$(VENV)/bin/$(PIP) -r requirements/test.txt
	@touch $@

$(TRITON_VENV)/.ready: requirements/triton.txt
	@test -n "$(TRITON_PYTHON)" || { echo "scanside: the CPU Triton needs Python 3.11 or 3.12; install one, or set TRITON_PYTHON=" >&2; exit 1; }
	@echo "scanside: building $(TRITON_VENV) (first time: a minute)"
	test -x $(TRITON_VENV)/bin/python || $(TRITON_PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/$(PIP) --no-deps -r requirements/triton.txt
	@touch $@

$(TRAINING_VENV)/.ready: requirements/training.txt
	test -x $(TRAINING_VENV)/bin/python || $(TRITON_PYTHON) -m venv $(TRAINING_VENV)
	$(TRAINING_VENV)/bin/$(PIP) -r requirements/training.txt
	@touch $@

$(ANSIBLE_VENV)/.ready: requirements/ansible.txt
	test -x $(ANSIBLE_VENV)/bin/python || $(PYTHON) -m venv $(ANSIBLE_VENV)
	$(ANSIBLE_VENV)/bin/$(PIP) -r requirements/ansible.txt
	@touch $@
