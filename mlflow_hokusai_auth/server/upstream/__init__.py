"""The server's only modules that depend on private parts of MLflow or its web servers.

They are what an upgrade may break, with the parts of the client that `tests/contract/test_mlflow.py`
lists beside them.
"""
