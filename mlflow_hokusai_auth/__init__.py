"""Hokusai API keys for MLflow.

core/         decides, without I/O: the credential of a request, its operation, allow or deny
store/        keeps keys and the audit log in a database of its own, and owners in MLflow's
authorities/  says who a key belongs to: the store, the auth service, and the caches before them
server/       is the gate inside `mlflow server --app-name hokusai-auth`, with its pages and API
client/       adds the key to the requests of MLflow's client, and diagnoses connections
cli/          is the command `hokusai-auth`
migrations/   holds the versions of the store's tables, for Alembic

Imports point one way: core <- store <- authorities <- server <- cli; import-linter checks it. `client`
imports a few modules of `core` only, except in the server's own jobs (`client/artifacts.py`); of the
others, only `cli` and `authorities/server_jobs.py` import it. This module imports nothing, so that a
client starts fast.
"""

__version__ = "0.1.0"
