"""The data that the server keeps: keys and the audit log in its own database, owners in MLflow's."""
