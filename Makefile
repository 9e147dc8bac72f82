# `make` lists the targets. Each is what a person does with this project.
MAKEFLAGS += --warn-undefined-variables --no-print-directory
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

XDG_CACHE_HOME ?= $(HOME)/.cache
DAY ?=
FULL_REFRESH ?=
SELECT ?=
FIRST ?=
LAST ?=
CMD ?= build
TESTS ?= tests
CHANGED ?=
CLUSTER ?=
PROCESSES ?= 4
FOR ?=
LIST ?=
KILLS ?=
ROUNDS ?=
MINUTES ?=
RUNS ?=
SEED ?=
REGISTRY ?= localhost:5000
BUILDER ?=
BASE_IMAGE ?=
IMAGE ?=
SIGN ?=
COSIGN_KEY ?=
TLOG ?=
ENV ?= local
KUBE_CONTEXT ?=
NAMESPACE ?=
RUN ?=
DEPLOYMENT ?= dbt-pipeline/dbt-pipeline-daily
PARAMETERS ?=
FORCE ?=
PREFECT ?=
CONFIRM ?=
PORT ?= 4200
JSON ?=
PAIRS ?= 7
POSTGRES ?=
BEFORE ?=
PGBOUNCER ?=
RUN_IMAGES ?=
FROM ?=
IDENTITY ?=
START_UNKNOWN ?=
SECRET ?=
KEEP_OLD ?=

# Variables from the command line and the environment are data: make expands no `$` in them, and the shell gets them quoted.
GIVEN := DAY FULL_REFRESH SELECT FIRST LAST CMD TESTS CHANGED FOR KILLS ROUNDS MINUTES RUNS SEED REGISTRY BUILDER BASE_IMAGE IMAGE \
	ENV KUBE_CONTEXT NAMESPACE RUN DEPLOYMENT PARAMETERS CONFIRM PORT PAIRS POSTGRES BEFORE PROCESSES RUN_IMAGES FROM IDENTITY SECRET \
	COSIGN_KEY
$(foreach name,$(GIVEN),$(if $(filter-out file,$(origin $(name))),$(eval \
	$(if $(filter command,$(firstword $(origin $(name)))),override) $(name) := $$(value $(name)))))
quoted = '$(subst ','\'',$(1))'

# The newest installed Python that dbt supports. uv comes from PyPI unless it is installed, in the version of docker/uv.txt.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && command -v $$python && break; done)
UV = $(shell command -v uv || echo .uv/bin/uv)
BIN := .venv/bin
WAREHOUSE := $(BIN)/python -m orchestration.warehouse

# The context that KUBE_CONTEXT names; for the local environment, by default the context of `make cluster`.
CONTEXT = $(if $(KUBE_CONTEXT),$(call quoted,$(KUBE_CONTEXT)),"$(if $(filter local,$(ENV)),$$($(BIN)/python -m orchestration.operations.local_cluster context))")
# kubectl and helm on PATH win over those that were built for the local cluster.
WITH_TOOLS = PATH="$$PATH:$$($(BIN)/python -m orchestration.operations.local_cluster path)"
ENVIRONMENT = $(WITH_TOOLS) $(BIN)/python -m orchestration.operations
TARGET = --env $(call quoted,$(ENV)) --context $(CONTEXT) --namespace $(call quoted,$(NAMESPACE))

export DO_NOT_TRACK := 1
export REGISTRY BUILDER BASE_IMAGE IMAGE COSIGN_KEY TLOG KUBE_CONTEXT CLUSTER
export UV_PYTHON_DOWNLOADS := never
# uv compiles packages at installation, so that the first run starts sooner.
export UV_COMPILE_BYTECODE ?= 1

# The parameters of the long tests that are set.
LONG = $(strip $(foreach name,KILLS ROUNDS MINUTES RUNS SEED,$(if $($(name)),$(call quoted,$(name)=$($(name))))))

# One process runs all tests of a file, as they share an installation. tests/conftest.py orders the files.
BY_FILE := --dist loadfile --no-loadscope-reorder

# The test files of TESTS, or those that the changes since main or since the commit CHANGED can affect.
SELECTED = $(if $(CHANGED),$$($(BIN)/python -m tests.selection$(if $(filter-out 1,$(CHANGED)), --base $(call quoted,$(CHANGED)))),$(TESTS))

# Not empty if the tests may use a cluster. It is made first, unless CLUSTER=none.
USES_CLUSTER = $(if $(CHANGED),,$(filter tests tests/cluster% tests/docker% tests/e2e%,$(TESTS)))

# With --quiet, --strict would accept a broken link.
SITE = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# $(call stage,NAME,COMMAND): run the command, and print how long it took.
stage = @printf '\n== %s\n' '$(1)'; start=$$SECONDS; status=0; { $(2); } || status=$$?; \
	printf '== %s: %s in %s s\n' '$(1)' "$$([ $$status = 0 ] && echo ok || echo FAILED)" "$$((SECONDS - start))"; exit $$status

##@ Run
.PHONY: run backfill
run: .venv/ready ## run the daily job for the next day, or for DAY=2013-02-08; FULL_REFRESH=1 SELECT=...
	@$(BIN)/python flows/example_flow.py $(if $(DAY),--day $(call quoted,$(DAY))) $(if $(FULL_REFRESH),--full-refresh) $(if $(SELECT),--select=$(call quoted,$(SELECT)))

backfill: .venv/ready ## load every missing day, or those from FIRST= to LAST=, and build once
	@$(BIN)/python flows/backfill.py $(if $(FIRST),--first $(call quoted,$(FIRST))) $(if $(LAST),--last $(call quoted,$(LAST))) $(if $(FULL_REFRESH),--full-refresh)

##@ Serve
.PHONY: server worker
# Time zones come from the package tzdata, which has a list. In the system's folder the server would open every file, often.
server: .venv/ready ## start a Prefect server with its UI on http://localhost:4200
	@PYTHONTZPATH= $(BIN)/prefect server start

worker: .venv/ready ## start a worker that runs deployments as processes of this machine
	@$(BIN)/prefect worker start --pool default --type process

##@ Warehouse
.PHONY: psql dbt dbt-docs stop
psql: .venv/ready ## open psql on the warehouse
	@$(WAREHOUSE) exec psql

dbt: .venv/ready ## run a dbt command on the warehouse, CMD="build --select route_performance"
	@$(WAREHOUSE) exec $(BIN)/dbt $(CMD) --project-dir flows/warehouse --profiles-dir flows/warehouse

dbt-docs: PORT := $(if $(filter override,$(origin PORT)),$(PORT),8080)
dbt-docs: .venv/ready ## generate the dbt project's docs and serve them on http://localhost:8080, or PORT=
	@$(WAREHOUSE) exec $(BIN)/dbt docs generate --project-dir flows/warehouse --profiles-dir flows/warehouse
	@$(WAREHOUSE) exec $(BIN)/dbt docs serve --port $(call quoted,$(PORT)) --no-browser --project-dir flows/warehouse --profiles-dir flows/warehouse

stop: .venv/ready ## stop the embedded warehouse
	@$(WAREHOUSE) stop

##@ Kubernetes (ENV=local by default; other environments need KUBE_CONTEXT=)
.PHONY: up down deploy plan rollback undeploy backup backups restore rotate run-on-cluster status doctor logs ui
up: cluster ## from nothing: make a cluster, build the image, install the charts, run the daily job as a pod
	@$(ENVIRONMENT) deploy $(TARGET)
	@$(ENVIRONMENT) run $(TARGET) $(call quoted,$(DEPLOYMENT))
	@$(ENVIRONMENT) status $(TARGET)
	@echo "Open the UI: make ui"

down: cluster-down ## delete the local cluster with everything on it

deploy: .venv/ready ## deploy the checkout to ENV: charts, pool, deployments; FORCE=1 upgrades unchanged releases too
	@$(ENVIRONMENT) deploy $(TARGET) $(if $(FORCE),--force)

plan: .venv/ready ## dry run: print what a deploy would change; for scripts see docs/how-to/deploy.md
	@$(ENVIRONMENT) plan $(TARGET)

rollback: .venv/ready ## roll back the newest deploy: image, charts, pool, deployments
	@$(ENVIRONMENT) rollback $(TARGET) $(if $(FORCE),--force)

undeploy: .venv/ready ## uninstall the releases; volumes and passwords stay; CONFIRM=ENV unless local
	@$(ENVIRONMENT) undeploy $(TARGET) --confirm $(call quoted,$(CONFIRM))

backup: .venv/ready ## back up the server's database now; needs backup.enabled in the server's values
	@$(ENVIRONMENT) backup $(TARGET)

backups: .venv/ready ## list the backups of the server's database; JSON=1
	@$(ENVIRONMENT) backups $(TARGET) $(if $(JSON),--json)

restore: .venv/ready ## restore the backup FROM=NAME or FROM=newest, and settle the runs; IDENTITY=FILE START_UNKNOWN=1 CONFIRM=ENV
	@$(ENVIRONMENT) restore $(TARGET) --confirm $(call quoted,$(CONFIRM)) $(if $(IDENTITY),--identity $(call quoted,$(IDENTITY))) $(if $(START_UNKNOWN),--start-unknown) -- $(call quoted,$(FROM))

rotate: .venv/ready ## rotate a password without downtime, SECRET=database, api, roles, redis, encryption or warehouse; KEEP_OLD=1
	@$(ENVIRONMENT) rotate $(TARGET) $(if $(KEEP_OLD),--keep-old) -- $(call quoted,$(SECRET))

run-on-cluster: .venv/ready ## run DEPLOYMENT=FLOW/NAME as a pod, PARAMETERS='{"day": "2013-02-08"}', and follow it
	@$(ENVIRONMENT) run $(TARGET) $(call quoted,$(DEPLOYMENT)) --parameters $(call quoted,$(PARAMETERS))

status: .venv/ready ## show components, pool, running and late runs, each deployment's last and next run; JSON=1
	@$(ENVIRONMENT) status $(TARGET) $(if $(JSON),--json)

doctor: .venv/ready ## check the environment before or after its install, each problem with its cure; JSON=1
	@$(WITH_TOOLS) $(BIN)/python -m orchestration doctor $(TARGET) $(if $(JSON),--json)

logs: .venv/ready ## follow the newest run, or RUN=NAME or RUN=ID
	@$(ENVIRONMENT) logs $(TARGET) $(if $(RUN),-- $(call quoted,$(RUN)))

ui: .venv/ready ## forward the UI to http://localhost:4200, or PORT=
	@$(ENVIRONMENT) ui $(TARGET) --port $(call quoted,$(PORT))

##@ Cluster and image
.PHONY: cluster cluster-down build push update-bases sbom worker-manifests
cluster: .venv/ready ## use the cluster of KUBE_CONTEXT, else make one: kind, else a node from packages
	@$(BIN)/python -m orchestration.operations.local_cluster up

cluster-down: .venv/ready ## delete the cluster that was made here
	@$(BIN)/python -m orchestration.operations.local_cluster down

build: ## build the image by BUILDER=docker or buildah, and print its name
	@docker/build

push: ## build the image and push it to REGISTRY=localhost:5000; SIGN=1 signs it by COSIGN_KEY=FILE
	@$(if $(SIGN),docker/sign,docker/build --push)

update-bases: ## write the present digests of the base images into docker/bases.toml
	@docker/build --update-bases

sbom: ## write the image's bill of materials to sbom.cdx.json
	@docker/sbom

worker-manifests: .venv/ready ## generate k8s/worker/base from the work pool's chart
	@$(BIN)/python -m k8s.worker.generate

##@ Docker
.PHONY: up-docker down-docker
up-docker: ## run server, worker and runs in Docker on this machine, without Kubernetes; PORT=4200, RUN_IMAGES=
	@docker/stack up

down-docker: ## stop everything in Docker; databases and passwords stay
	@docker/stack down

##@ Develop
.PHONY: setup test test-long test-versions audit fix bench bench-deploys bench-dbt bench-deployments bench-reconciler bench-recovery bench-access bench-retention bench-upgrade bench-health bench-load bench-idle bench-starts bench-cluster bench-bursts picture docs docs-site clean
setup: .venv/ready ## create the environment in .venv

# Memory in huge pages, as in the image: docker/Dockerfile says why.
test test-long: export PYTHONMALLOC := malloc
test test-long: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1:glibc.malloc.arena_max=2
# mypy's cache outlives a checkout: files are compared by content. Without it mypy takes one to four minutes.
test: export MYPY_CACHE_DIR := $(XDG_CACHE_HOME)/prefect-orchestration/mypy
# With CHANGED, tests use no cluster: making one takes minutes.
test: CLUSTER := $(or $(if $(CHANGED),none),$(CLUSTER))
test: .venv/ready ## check the code and run all tests, PROCESSES=4 at once; TESTS=tests/flows for some; CHANGED=1; CLUSTER=none
	$(if $(USES_CLUSTER),@$(BIN)/python -m tests.preview)
	$(call stage,ruff,$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check .)
	$(call stage,yamllint,$(BIN)/yamllint -s .)
	$(call stage,codespell,$(BIN)/codespell)
	$(call stage,docs-site,$(SITE))
	$(call stage,shellcheck and hadolint,$(BIN)/shellcheck docker/build docker/sbom docker/sign docker/stack docker/databases/entrypoint helm/prefect-server/files/backup k8s/overlays/local/warehouse/secret k8s/overlays/local/warehouse/application-user .ci/run && $(BIN)/hadolint docker/Dockerfile docker/databases/Dockerfile)
	$(call stage,sqlfluff,$(BIN)/sqlfluff lint -q flows/warehouse --nocolor)
	$(if $(and $(USES_CLUSTER),$(filter-out none,$(or $(CLUSTER),any))),$(call stage,mypy while the cluster is made,$(BIN)/mypy & { $(BIN)/python -m orchestration.operations.local_cluster up || [ -z "$${CI:-}$(CLUSTER)" ]; } && wait $$!),$(call stage,mypy,$(BIN)/mypy))
	$(call stage,pytest,tests="$(SELECTED)" && { [ -z "$$tests" ] || $(BIN)/pytest$(if $(CHANGED)$(filter tests,$(TESTS)), --numprocesses $(call quoted,$(PROCESSES)) $(BY_FILE)) $$tests; })

test-long: .venv/ready ## run the long tests, or FOR="soak kills"; LIST=1 lists them; KILLS= ROUNDS= MINUTES= RUNS= SEED=; FORCE=1 repeats passed ones
	@$(BIN)/python -m tests.long $(if $(FOR),--for $(FOR)) $(if $(LIST),--list) $(if $(FORCE),--force) $(if $(LONG),--with $(LONG))

test-versions: .venv/ready ## run the contract tests on the oldest and newest Prefect, or on PREFECT="3.9.0 3.9.1"; JSON=1
	@$(BIN)/python -m tests.versions $(PREFECT) $(if $(JSON),--json)

audit: .venv/ready ## report known vulnerabilities of the packages in uv.lock
	@$(UV) export -q --locked --all-extras --no-emit-project | $(UV) tool run -q pip-audit==2.10.1 --require-hashes --disable-pip -r /dev/stdin

fix: .venv/ready ## format the code, and fix what the linters can fix
	@$(BIN)/ruff check -q --fix . && $(BIN)/ruff format -q . && $(BIN)/sqlfluff fix -q flows/warehouse

bench: .venv/ready ## measure run times PAIRS=7 times; print a table, and append it to tests/benchmarks/results.md
	@$(BIN)/python -m tests.benchmarks.run --pairs $(call quoted,$(PAIRS))

bench-deploys: .venv/ready ## measure make up and make deploy; deletes the local cluster first
	@$(BIN)/python -m tests.benchmarks.deploys --pairs $(call quoted,$(PAIRS))

bench-dbt: .venv/ready ## measure dbt in a flow against dbt's command line, at 20, 300 and 1,000 nodes
	@$(BIN)/python -m tests.benchmarks.dbt --pairs $(call quoted,$(PAIRS))

bench-deployments: .venv/ready ## measure orchestrate plan and sync against prefect deploy --all; POSTGRES=URL of a Postgres with pg_trgm
	@$(BIN)/python -m tests.benchmarks.deployments --pairs $(call quoted,$(PAIRS)) $(if $(POSTGRES),--postgres $(call quoted,$(POSTGRES)))

bench-reconciler: .venv/ready ## measure a reconcile round over 100 to 5,000 simulated runs; POSTGRES=URL of a Postgres with pg_trgm
	@$(BIN)/python -m tests.benchmarks.reconciler $(if $(POSTGRES),--postgres $(call quoted,$(POSTGRES)))

bench-access: PAIRS := 500
bench-access: .venv/ready ## measure what access control and the login by OIDC add to a request of the Prefect API, PAIRS=500 times
	@$(BIN)/python -m tests.benchmarks.access --pairs $(call quoted,$(PAIRS))

bench-retention: RUNS := 1000000
bench-retention: LOGS := 20000000
bench-retention: EVENTS := 10000000
bench-retention: .venv/ready ## measure the pages of the UI and retention on a database of RUNS=1000000 runs, LOGS=20000000 log lines and EVENTS=10000000 events
	@$(BIN)/python -m tests.benchmarks.retention --runs $(call quoted,$(RUNS)) --logs $(call quoted,$(LOGS)) --events $(call quoted,$(EVENTS))

bench-upgrade: RUNS := 1000000
bench-upgrade: EVENTS := 10000000
bench-upgrade: PAIRS := 1
bench-upgrade: .venv/ready ## measure the upgrade from the previous Prefect on a database of RUNS=1000000 runs and EVENTS=10000000 events, PAIRS=1 times
	@$(BIN)/python -m tests.benchmarks.upgrade --runs $(call quoted,$(RUNS)) --events $(call quoted,$(EVENTS)) --pairs $(call quoted,$(PAIRS))

bench-health: PAIRS := 3
bench-health: .venv/ready ## measure how soon the health of the background services turns red and green at each fault, PAIRS=3 times
	@$(BIN)/python -m tests.benchmarks.health --pairs $(call quoted,$(PAIRS))

bench-load: RUNS := $(or $(RUNS),1000)
bench-load: MINUTES := $(or $(MINUTES),5)
bench-load: .venv/ready ## measure how many runs a server takes, with 1, 2 and 3 API replicas; kill these for MINUTES=5; RUNS=1000 live, and due at once; PGBOUNCER=1
	@$(BIN)/python -m tests.benchmarks.load --minutes $(call quoted,$(MINUTES)) --live $(call quoted,$(RUNS)) --runs $(call quoted,$(RUNS)) $(if $(PGBOUNCER),--pgbouncer)

bench-recovery: KILLS := $(or $(KILLS),10)
bench-recovery: .venv/ready ## measure how soon a killed run continues, KILLS=10 times on the local cluster
	@PACE=shipped $(BIN)/python -m tests.benchmarks.recovery --kills $(call quoted,$(KILLS))

bench-idle: PAIRS := 5
bench-idle: .venv/ready ## measure what an idle installation takes, for PAIRS=5 minutes on the local cluster; BEFORE=CHECKOUT measures that one too
	@PACE=shipped $(BIN)/python -m tests.benchmarks.idle --pairs $(call quoted,$(PAIRS)) $(if $(BEFORE),--before $(call quoted,$(BEFORE)))

bench-starts: PAIRS := 15
bench-starts: .venv/ready ## measure a run's container to its first line without a cluster, PAIRS=15 times; BEFORE=CHECKOUT measures that one too
	@$(BIN)/python -m tests.benchmarks.starts --pairs $(call quoted,$(PAIRS)) $(if $(BEFORE),--before $(call quoted,$(BEFORE)))

bench-cluster: PAIRS := 15
bench-cluster: .venv/ready ## measure a run's start to its first line, PAIRS=15 times on the local cluster; BEFORE=CHECKOUT measures that one too
	@PACE=shipped $(BIN)/python -m tests.benchmarks.cluster --pairs $(call quoted,$(PAIRS)) $(if $(BEFORE),--before $(call quoted,$(BEFORE)))

bench-bursts: PAIRS := 5
bench-bursts: .venv/ready ## measure runs that come together, PAIRS=5 times on the local cluster: rate, cost, lateness, fairness
	@PACE=shipped $(BIN)/python -m tests.benchmarks.bursts --pairs $(call quoted,$(PAIRS))

picture: .venv/ready ## draw the pictures of README and docs
	@$(BIN)/python -m docs.picture

docs: .venv/ready ## generate parts of docs/reference
	@$(BIN)/python -m docs.generate

docs-site: .venv/ready ## build the docs as a site in build/site; fails on a broken link
	@$(SITE)

clean: ## remove .venv and the tools' caches; the warehouse stays
	rm -rf .venv .uv .mypy_cache .pytest_cache .ruff_cache build/site flows/warehouse/target flows/warehouse/logs

.PHONY: help
help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "; tty = system("test -t 1") == 0} \
		/^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  %s%-17s%s %s\n", tty ? "\033[36m" : "", $$1, tty ? "\033[0m" : "", $$2}' Makefile

.venv/ready: pyproject.toml uv.lock
	@[ -n "$(PYTHON)" ] || { echo "No Python 3.11, 3.12 or 3.13 was found. Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@[ -x "$(UV)" ] || { echo "Installing uv in .uv"; $(PYTHON) -m venv .uv && .uv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r docker/uv.txt; }
	@echo "Creating the environment in .venv (about half a minute)"
	@$(UV) sync -q --locked --all-extras --python $(PYTHON)
	@touch $@
