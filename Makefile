# Coffer. `make` alone lists what there is.
#
# Every target does its own set-up: dependencies come from requirements.lock into a virtual environment, again whenever the
# lock or pyproject.toml changed. Another Python: `make test PYTHON=python3.13` makes the environment anew.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
PORT ?= 3001
DATA ?= .coffer
# What `make test` hands to pytest: make test TESTS="tests/quota -k race"
TESTS ?=
# Sections for `make bench`: make bench BENCH="large small"
BENCH ?=
# Two more than there are processors: many tests wait for servers and workers.
TEST_PROCESSES ?= $(shell expr $$(nproc) + 2)
# Attacks for `make attack`, by number: make attack ATTACK="5 14"
ATTACK ?=
# Faults for `make torture`, by number: make torture TORTURE="1 2"
TORTURE ?=
# Commands that tests run, with their Debian packages: strace shows the order of system calls, curl and openssl run the tours of the README,
# clamd scans uploads, Chromium is the browser in which no stored byte may run, Node runs the tus clients of tests/tus/clients, nginx with
# its Lua module is the edge, restic keeps backups, promtool fires the alerts of ops/monitoring and amtool sends them where
# they belong, disks get XFS, and systemd reads its units.
# What is no command stands with its path.
LUA_MODULE := /usr/lib/nginx/modules/ngx_http_lua_module.so
TEST_PACKAGES := curl=curl openssl=openssl strace=strace clamd=clamav-daemon chromium=chromium node=nodejs npm=npm \
	nginx=nginx-light $(LUA_MODULE)=libnginx-mod-http-lua restic=restic promtool=prometheus amtool=prometheus-alertmanager mkfs.xfs=xfsprogs \
	systemd-analyze=systemd

# Steps for `make try-install`, by name
TRY ?=

VENV := .venv
RUN := $(VENV)/bin/python
# The lock's sets build on each other: each is the file's text up to the end of its section.
RUNNING := $(VENV)/.embedded-$(notdir $(PYTHON))
DEVELOPING := $(VENV)/.development-$(notdir $(PYTHON))

##@ Using Coffer

.PHONY: run
run: $(RUNNING)  ## start everything and print the first upload's commands (PORT=3001 DATA=.coffer)
	@exec $(RUN) -m ops.run start --port "$(PORT)" --data "$(DATA)"

.PHONY: stop
stop:  ## stop what `make run` started (DATA=.coffer)
	@if [[ -x $(RUN) ]]; then exec $(RUN) -m ops.run stop --data "$(DATA)"; else echo "coffer: nothing was ever started here"; fi

##@ On a server (Debian with systemd, as root)

# What would be done: make install REHEARSE=--rehearse
REHEARSE ?=

.PHONY: install
install:  ## install Coffer with PostgreSQL, units and timers, or bring them in order again (VOLUME= DATABASE_URL= EDGE=)
	@VOLUME="$(VOLUME)" DATABASE_URL="$(DATABASE_URL)" EDGE="$(EDGE)" exec ops/install.sh $(REHEARSE) install

.PHONY: upgrade
upgrade:  ## bring this version into use, while requests go on
	@exec ops/install.sh $(REHEARSE) upgrade

.PHONY: uninstall
uninstall:  ## take Coffer away again; settings, database and files stay
	@exec ops/install.sh $(REHEARSE) uninstall

##@ Working on Coffer

.PHONY: test
# Tests start hundreds of processes. Where the environment forbids Python to keep what it has compiled, each would compile all of us anew.
test: export PYTHONDONTWRITEBYTECODE =
test: $(DEVELOPING) test-packages  ## run all tests, on all cores (TESTS="tests/quota -k race" for some)
	@$(RUN) -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(TESTS)

.PHONY: check
check: $(DEVELOPING)  ## lint, formatting, types, arrows between the rooms
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy
	@$(RUN) $(VENV)/bin/lint-imports --no-logo --no-cache

.PHONY: format
format: $(DEVELOPING)  ## rewrite the code in the house's format
	@$(RUN) -m ruff check --fix-only --quiet
	@$(RUN) -m ruff format

.PHONY: attack
attack: $(DEVELOPING) test-packages  ## try what must be refused against a running server (ATTACK="5 14" for some)
	@$(RUN) -m tests.attack $(ATTACK)

.PHONY: torture
torture: $(DEVELOPING)  ## break what may break under a running server, at length (TORTURE="1 2" for some)
	@$(RUN) -m tests.torture $(TORTURE)

.PHONY: try-install
try-install:  ## on a Debian to throw away, as root: install, use, break, upgrade, reboot, uninstall (TRY="use upgrade" for some)
	@exec python3 -m tests.machine $(TRY)

.PHONY: bench
bench: $(DEVELOPING)  ## measure the speed, as ratios within one session
	@$(RUN) -m tests.bench $(BENCH)

##@ Set-up

.PHONY: venv
venv: $(DEVELOPING)  ## only make the virtual environment, with every dependency

.PHONY: lock
lock: $(DEVELOPING)  ## resolve the dependencies anew into requirements.lock
	@$(RUN) -m ops.lock

.PHONY: clean
clean:  ## remove what can be made again; data in DATA stays
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find server ops tests -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help
help:
	@awk 'BEGIN { FS = ":.*  ## " } /^##@ / { print "\n" substr($$0, 5) } /^[a-z-]+:.*  ## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

.PHONY: test-packages
test-packages:
	@missing=; PATH=$$PATH:/usr/sbin; for each in $(TEST_PACKAGES); do command -v $${each%=*} >/dev/null || [[ -e $${each%=*} ]] || missing+=" $${each#*=}"; done; \
	if [[ -z $$missing ]]; then exit; fi; \
	if [[ $$(id -u) == 0 ]] && command -v apt-get >/dev/null; then \
		echo "coffer: installing for the tests:$$missing"; \
		if [[ ! -e /usr/sbin/policy-rc.d ]]; then  `# tests start what they need themselves: no service is to run because of them` \
			trap 'rm -f /usr/sbin/policy-rc.d' EXIT; \
			printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; \
		fi; \
		{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $$missing; } >/dev/null; \
	else echo "coffer: the tests need these Debian packages:$$missing" >&2; exit 1; fi

$(VENV)/.%-$(notdir $(PYTHON)): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "coffer: this needs Python 3.11 to 3.13; name one with PYTHON=")'
	@version='import sys; print(sys.version)'; \
	if ! $(RUN) -m pip --version >/dev/null 2>&1 || [[ $$($(RUN) -c "$$version") != "$$($(PYTHON) -c "$$version")" ]]; then \
		echo "coffer: making a virtual environment in $(VENV)"; $(PYTHON) -m venv --clear $(VENV); fi
	@echo "coffer: installing the locked dependencies ($*); the first time takes a minute"
	@awk '/^# set: / { if (last) exit; last = $$3 == "$*" } { print }' requirements.lock >$(VENV)/$*.txt
	@$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/$*.txt
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
