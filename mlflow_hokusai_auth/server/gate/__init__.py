"""The gate: every request comes by here, and nothing of MLflow is called before its verdict."""
