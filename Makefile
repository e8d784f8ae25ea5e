# make demo: everything, once, on a real model.   make test: the tests.   Both do all set-up.
.PHONY: setup data demo serve wheel packages test soak fuzz lint docs check-deploy check-image
.NOTPARALLEL:  # each target needs the one before it

python = .venv/bin/python
# All Python: what has no suffix .py says so in its first line.
sources = cast_train cast_serve loadtest benchmarks tests deploy/check/image $(wildcard docs/*.py scripts/*.py) $(shell grep -rslI '^.!/usr/bin/env python' scripts deploy)

setup:
	@scripts/setup

data: setup
	@$(python) scripts/data

demo: data
	@$(python) scripts/demo

serve: data  # the demo's two models, until Ctrl-C
	@[ -d runs/demo/int8 ] || { echo "make serve: no model to serve yet; run make demo first" >&2; exit 2; }
	.venv/bin/cast-serve up --variant dense=data/models/smollm2-135m-dense --variant sparse=runs/demo/int8

wheel: setup  # dist/*.whl with compiled CPU kernels, whose installing needs no compiler
	$(python) scripts/wheel

packages:  # as root, the system packages that are missing
	@scripts/install-packages || echo "make: going on; the tests that need what is missing are skipped, as pytest's summary says" >&2

test: packages data  # in two processes, see tests/conftest.py; pictures of dashboard and report land in build/artifacts
	CAST_ARTIFACTS=build/artifacts OMP_WAIT_POLICY=passive $(python) -m pytest -n 2 --no-loadscope-reorder

MINUTES = 10
SEED = 0

soak: setup  # hostile load and faults against a gateway; benchmarks/gateway.md has what it tries
	$(python) -m tests.soak --minutes $(MINUTES) --seed $(SEED)

fuzz: setup  # MINUTES of CPU for each target
	$(python) -m tests.fuzz --minutes $(MINUTES) --seed $(SEED)

lint: setup
	.venv/bin/ruff format --check $(sources)
	.venv/bin/ruff check $(sources)
	.venv/bin/mypy $(sources)
	.venv/bin/clang-format --dry-run -Werror cast_serve/kernels/cpu/csrc/*

docs: setup  # the pages of docs/ as a site in build/site; a broken link ends it
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

check-deploy: setup  # what can be checked of deploy/ without a cluster; the tests run it too
	$(python) scripts/check-deploy

check-image: setup  # as root: both images built and run by podman, compose's services and pods; ten minutes to an hour
	$(python) scripts/check-image
