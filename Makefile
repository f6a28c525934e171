# `make demo` shows the whole job; `make test` runs the tests. Both first install their needs into .venv.
PYTHON ?= python3
VENV ?= .venv
PIP_OPTIONS = --disable-pip-version-check
PIP = $(VENV)/bin/python -m pip $(PIP_OPTIONS)
PYTEST = $(VENV)/bin/python -m pytest
PARALLEL = --numprocesses 2
export PIP_NO_INPUT = 1
# Compiling all tests takes each process of pytest 7 s: keep what has been compiled.
unexport PYTHONDONTWRITEBYTECODE
# Older versions of MLflow that `make test-matrix` runs on.
MATRIX ?= 3.4.0 3.9.0 3.12.0

.PHONY: install-all demo serve stack stack-down image test test-servers test-long test-long-changed soak test-docker \
	test-pythons test-matrix lint docs fuzz bench bench-scale mutants dist check-dist check-tag smoke \
	smoke-image programs clean

# The packages of a server.
$(VENV)/server.stamp: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --editable '.[server]'
	touch $@

# The packages of a developer.
$(VENV)/test.stamp: $(VENV)/server.stamp
	$(PIP) install --editable '.[test]'
	touch $@

# Everything that `.ci/run` needs.
install-all: $(VENV)/test.stamp $(VENV)/docs.stamp $(MATRIX:%=.venv-%/stamp)

demo: $(VENV)/server.stamp
	$(VENV)/bin/hokusai-auth demo $(if $(KEEP),--keep)

serve: $(VENV)/server.stamp
	$(VENV)/bin/mlflow server --app-name hokusai-auth $(ARGS)

# Two replicas behind nginx, with PostgreSQL, Redis and Prometheus, in containers.
stack:
	docker/stack up

stack-down:
	docker/stack down

image:
	docker/stack compose build

# Tests in process, and one server that does the main job. The other tiers are below.
test: $(VENV)/test.stamp
	$(PYTEST) -m 'not servers and not long and not docker' $(PARALLEL) --dist worksteal $(ARGS)

# Tests of servers of each kind, by sockets, clients and a browser.
test-servers: $(VENV)/test.stamp
	$(PYTEST) -m 'servers and not long and not docker' $(PARALLEL) --dist loadfile $(ARGS)

# Tests that take minutes. Run all of them before a release; `.ci/run` runs `test-long-changed`.
test-long: $(VENV)/test.stamp
	$(PYTEST) -m 'long and not docker' $(PARALLEL) --dist loadfile $(ARGS)

test-long-changed: $(VENV)/test.stamp
	files=$$($(VENV)/bin/python .ci/long_tests.py) && \
		LONG_TESTS_SECONDS=480 $(PYTEST) -m 'long and not docker' $(PARALLEL) --dist loadfile $(ARGS) $$files

# Put a server under load for minutes, and print the figures; REQUESTS=1000000 takes longer.
REQUESTS ?= 100000
soak: $(VENV)/test.stamp
	SOAK_REQUESTS=$(REQUESTS) $(PYTEST) tests/soak/test_soak.py -s $(ARGS)

# Tests in real containers; they are skipped if no Docker engine answers.
test-docker: $(VENV)/test.stamp
	$(PYTEST) tests/docker -m docker $(ARGS)

# `make test` with each installed Python, in separate environments.
PYTHONS ?= 3.10 3.11 3.12 3.13
test-pythons:
	for version in $(PYTHONS); do \
		if python=$$(bash .ci/python $$version); \
		then $(MAKE) test PYTHON="$$python" VENV=.venv-python$$version || exit 1; \
		else printf 'Python %s is not here, and is not tested.\n' $$version; fi; done

# The tests that depend on MLflow's version, on older versions, in separate environments. They leave out
# `mlflow models serve`, because that of MLflow 3.4 does not start with a current FastAPI.
MATRIX_TESTS = tests/e2e/test_registration.py tests/e2e/test_every_route.py tests/e2e/test_forked.py \
	tests/client/test_sending.py tests/client/test_artifacts.py tests/client/test_default_experiment.py tests/core/test_operations.py \
	tests/adversarial/test_artifacts.py tests/adversarial/test_spelling.py tests/e2e/test_locations.py \
	tests/e2e/test_artifact_paths.py tests/e2e/test_isolation.py tests/e2e/test_isolation_artifacts.py \
	tests/e2e/test_confidentiality.py tests/e2e/test_provenance.py tests/server/isolation/test_provenance.py \
	tests/server/isolation/test_reads.py tests/server/isolation/test_writes.py \
	tests/server/upstream/test_repositories.py tests/contract/test_mlflow.py tests/server/upstream/test_fast_path.py
test-matrix: $(MATRIX:%=test-mlflow-%)

test-mlflow-%: .venv-%/stamp
	.venv-$*/bin/python -m pytest $(MATRIX_TESTS) -m 'not long' -k 'not served' $(PARALLEL) --dist loadfile $(ARGS)

.venv-%/stamp: setup.py pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip $(PIP_OPTIONS) install --editable '.[test]' 'mlflow==$*' 'sqlalchemy<2.1'
	touch $@

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/python .ci/find_keys.py
	$(VENV)/bin/python .ci/check_pages.py

# Feed random bytes, guided by coverage, to the parsers of keys, headers and paths. atheris is not among
# the tests' requirements, because it does not have a wheel for every Python.
SECONDS ?= 60
fuzz: $(VENV)/test.stamp
	$(PIP) install atheris
	for name in credentials operations keys; do \
		$(VENV)/bin/python -m tests.fuzz $$name $(SECONDS) || exit 1; done

# ARGS=--docs writes the figures to docs/benchmarks.md. nginx is one of the peers if it is installed.
bench: $(VENV)/test.stamp .venv-peers/stamp
	$(VENV)/bin/python -m bench $(ARGS)

# The peers of the bench. mlflow-oidc-auth 11 has a mutable default, which Python 3.11 refuses.
.venv-peers/stamp: $(VENV)/server.stamp
	$(VENV)/bin/python -m venv .venv-peers
	.venv-peers/bin/python -m pip $(PIP_OPTIONS) install httpx httptools mlflow-oidc-auth==11.0.2 \
		"mlflow[auth]==$$($(VENV)/bin/python -c 'import importlib.metadata as m; print(m.version("mlflow"))')"
	sed -i 's/^\(    extra_filter: .*\) = _NO_FILTER$$/\1 = __import__("dataclasses").field(default_factory=dict)/' \
		.venv-peers/lib/python3*/site-packages/mlflow_oidc_auth/permission_kinds.py
	touch $@

# Measure with PostgreSQL and Redis, 1 to 4 workers and two replicas; ARGS=--docs writes docs/scale.md.
bench-scale: $(VENV)/test.stamp
	$(VENV)/bin/python -m bench.scale $(ARGS)

# Make a site of docs/ in docs/_build, and fail for a link that leads nowhere.
docs: $(VENV)/docs.stamp
	$(VENV)/bin/sphinx-build --fail-on-warning --keep-going --fresh-env -b html docs docs/_build

$(VENV)/docs.stamp: $(VENV)/test.stamp
	$(PIP) install --editable '.[docs]'
	touch $@

# Remove each guard of core/, store/, authorities/ and server/ in turn, and check that a test fails; takes hours.
mutants: $(VENV)/test.stamp
	$(VENV)/bin/python -m tests.mutants $(ARGS)

dist: $(VENV)/test.stamp
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist .

# Check that a package index accepts both archives, and that each installs and loads in a new environment.
check-dist: dist
	$(VENV)/bin/twine check --strict dist/*
	bash .ci/check-dist dist/*

# Check that `hokusai-auth smoke` passes on a server from the wheel, and on one from the image.
smoke: dist
	bash .ci/smoke dist/*.whl

smoke-image: dist image
	bash .ci/smoke dist/*.whl $${SERVER_IMAGE:-mlflow-hokusai-auth:latest}

# Check that the tag $TAG is the package's version, and that the changelog has a section for it.
check-tag:
	bash .ci/check-tag "$$TAG"

# Install the programs that tests need, from Debian. Tests whose program is missing are skipped.
programs:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
		redis-server postgresql chromium prometheus

clean:
	rm -rf .venv* build dist *.egg-info
