# `make demo` shows the whole job; `make test` runs the tests. Both install what they need into .venv.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
export PIP_NO_INPUT = 1

# By file, as tests of one file share their servers; those with servers first, as they take longest.
PARALLEL = --numprocesses 2 --dist loadfile

.PHONY: demo serve test test-matrix test-slow lint bench dist clean

# What a user of the server installs.
$(VENV)/server.stamp: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --editable '.[server]'
	touch $@

# What a developer adds.
$(VENV)/test.stamp: $(VENV)/server.stamp
	$(PIP) install --editable '.[test]'
	touch $@

demo: $(VENV)/server.stamp
	$(VENV)/bin/hokusai-auth demo $(if $(KEEP),--keep)

serve: $(VENV)/server.stamp
	$(VENV)/bin/mlflow server --app-name hokusai-auth $(ARGS)

test: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest tests/e2e tests -m 'not slow' $(PARALLEL) $(ARGS)

test-slow: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -m slow $(PARALLEL) $(ARGS)

# The tests that touch MLflow's internals, on older MLflow, each in an environment of its own.
MATRIX ?= 3.4.0 3.12.0
# (Not `mlflow models serve`: that of 3.4 does not start with a FastAPI of today.)
MATRIX_TESTS = tests/e2e/test_registration.py tests/e2e/test_every_route.py tests/client \
	tests/adversarial tests/core/test_operations.py
test-matrix: $(MATRIX:%=test-mlflow-%)

test-mlflow-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip --disable-pip-version-check --quiet install \
		--editable '.[test]' 'mlflow==$*' 'sqlalchemy<2.1'
	.venv-$*/bin/python -m pytest $(MATRIX_TESTS) -k 'not served' $(PARALLEL) $(ARGS)

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

bench: $(VENV)/test.stamp
	$(VENV)/bin/python -m tests.bench $(ARGS)

dist: $(VENV)/test.stamp
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info
