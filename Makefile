# What people type. `make demo` renders for real, `make test` is what CI runs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CHAOS ?= --round all
GPU ?=

.PHONY: install demo test check bench bench-gpu chaos clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the farm needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[farm,dev]'
	@touch $@

demo: install
	$(BIN)/farm render manifests/quickstart.yaml

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: install
	@infra/s3/ceph.sh install || echo 'no S3 server: its tests are skipped, or fail where CI=true'
	@infra/prometheus/install.sh || echo 'no Prometheus: its tests are skipped, or fail where CI=true'
	$(BIN)/pytest --numprocesses 3 --dist loadgroup

bench: install
	$(BIN)/python -m farm.bench

bench-gpu: install
	$(BIN)/python -m farm.bench.gpu $(GPU)

chaos: install
	infra/s3/ceph.sh install
	$(BIN)/python -m tests.chaos $(CHAOS)

clean:
	rm -rf $(VENV) farm-data
