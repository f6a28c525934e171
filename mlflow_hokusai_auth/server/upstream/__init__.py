"""The only modules that depend on private parts of MLflow or its web servers: the upgrade list."""
