# nSVM harness. `make help` lists the targets. CI and hooks call these, never flags of their own.

PYTHON ?= python3
BIN := .venv/bin

# The newest kernel's headers from Debian's archive, or without the network this machine's own.
NEWEST_HEADERS = $$($(BIN)/python -c 'from harness.host.userland import headers; print(headers()[1])' \
	2>/dev/null || echo /usr/include)

.DEFAULT_GOAL := help
.PHONY: help setup run test nightly bench lint abi clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

setup: ## install what is missing: system packages, .venv
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) not found; install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) harness/setup_machine.py

run: setup ## measure nested state and run the quick scenarios on the best host there is
	@$(BIN)/nsvm memory
	@$(BIN)/nsvm run --quick

test: lint ## check the style and types, then run every test that this machine can
	@echo "== pytest: all that boots no emulated host"
	@NSVM_KERNEL_HEADERS="$${NSVM_KERNEL_HEADERS:-$(NEWEST_HEADERS)}" \
		$(BIN)/python -m pytest -q -m "not emulated and not nightly"
	@echo "== pytest: what boots an emulated host"
	@$(BIN)/python -m pytest -q -m "emulated and not nightly"

nightly: setup ## run the tests that take minutes each
	@$(BIN)/python -m pytest -q -m nightly

bench: setup ## measure what the harness itself costs
	@$(BIN)/nsvm bench

lint: setup ## ruff and mypy
	@echo "== ruff format"
	@$(BIN)/python -m ruff format --check --quiet .
	@echo "== ruff check"
	@$(BIN)/python -m ruff check --quiet --output-format concise .
	@echo "== mypy"
	@$(BIN)/python -m mypy --no-error-summary

abi: setup ## compare the declared kernel ABI with this machine's headers and the newest
	@$(BIN)/python -m kvm_ioctl.abi --headers /usr/include
	@$(BIN)/python -m kvm_ioctl.abi --headers "$(NEWEST_HEADERS)"

clean: ## remove what the targets made in this tree, but results/
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
