"""Hokusai API keys for MLflow.

client/    what runs on a supplier's machine: adds the key to MLflow's requests, and only there
core/      the decisions, pure: which key, which operation, allowed or not
backends/  who a key belongs to: the embedded store, the cache in front of it
server/    the gate inside `mlflow server --app-name hokusai-auth`
cli/       `hokusai-auth`: keys, the audit log, routes, the demo; whoami and doctor from client/

Imports point one way: core <- backends <- server, cli. `client` stands alone (it may use `core.keys`).
This module imports nothing, so that a client pays nothing for what it does not use.
"""

__version__ = "0.1.0"
