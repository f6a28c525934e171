"""The package. Its version is written once, in `mlflow_hokusai_auth/__init__.py`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "mlflow_hokusai_auth/__init__.py").read_text(), re.MULTILINE
)[1]

# MLflow brings most of these, and sets the upper bounds.
SERVER = [
    "mlflow>=3.4,<4",
    "SQLAlchemy>=2.0",
    "alembic",
    "cachetools>=5",
    "click>=8",
    "cryptography",
    "fastapi",
    "flask",
    # The first one whose parser has a limit of tokens.
    "graphql-core>=3.2.3",
    "itsdangerous>=2",
    "limits>=3",
    "opentelemetry-api",
    "prometheus-client>=0.20",
    "PyJWT>=2.10.1",
    "pydantic>=2.7",
    "pydantic-settings>=2.3",
    "requests>=2.31",
    "starlette",
    "urllib3>=2",
    "werkzeug>=3",
]
POSTGRES = ["psycopg[binary]>=3.1"]
REDIS = ["redis>=5"]
#: Identity tokens of CI jobs, for HOKUSAI_TRUST=auto.
CI = ["id>=1.5"]
DOCS = ["furo", "myst-parser", "sphinx"]
TEST = [
    "axe-playwright-python",
    "boto3",
    "build",
    "check-jsonschema",
    "docker",
    "gunicorn",
    "httptools",
    "hypothesis",
    "import-linter",
    # Its server also needs flask and flask-cors, which MLflow brings.
    "moto",
    "mypy",
    "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry-sdk",
    "playwright",
    "pre-commit",
    # SQLAlchemy's driver for postgresql://, so that of most of MLflow's databases there.
    "psycopg2-binary",
    "pytest",
    "pytest-xdist",
    "ruff",
    "schemathesis>=4",
    "time-machine",
    "twine",
    "types-cachetools",
    "types-requests",
    "types-setuptools",
    "waitress",
]

setup(
    name="mlflow-hokusai-auth",
    version=VERSION,
    description="Hokusai API keys for MLflow: checked inside the tracking server, sent by the client",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
    packages=find_packages(include=["mlflow_hokusai_auth", "mlflow_hokusai_auth.*"]),
    package_data={
        "mlflow_hokusai_auth": [
            "py.typed",
            "server/web/static/*",
            "server/web/templates/hokusai/*",
        ]
    },
    install_requires=["mlflow-skinny>=2.9"],
    extras_require={
        "server": SERVER,
        "ci": CI,
        "postgres": POSTGRES,
        "redis": REDIS,
        "docs": DOCS,
        "test": SERVER + CI + POSTGRES + REDIS + TEST,
    },
    entry_points={
        "console_scripts": ["hokusai-auth = mlflow_hokusai_auth.cli:main"],
        "mlflow.app": [
            "hokusai-auth = mlflow_hokusai_auth.server.app:create_app",
            "hokusai-auth-wsgi = mlflow_hokusai_auth.server.wsgi_app:app",
        ],
        "mlflow.app.client": ["hokusai-auth = mlflow_hokusai_auth.client.admin:HokusaiAuthClient"],
        "mlflow.artifact_repository": [
            "mlflow-artifacts = mlflow_hokusai_auth.client.artifacts:HokusaiArtifactRepository"
        ],
        "mlflow.default_experiment_provider": [
            "hokusai = mlflow_hokusai_auth.client.default_experiment:HokusaiDefaultExperimentProvider"
        ],
        "mlflow.request_header_provider": [
            "hokusai = mlflow_hokusai_auth.client.header_provider:HokusaiHeaderProvider"
        ],
        "mlflow.request_auth_provider": [
            "hokusai = mlflow_hokusai_auth.client.auth_provider:HokusaiAuthProvider"
        ],
    },
)
