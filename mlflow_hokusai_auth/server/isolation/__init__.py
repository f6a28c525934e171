"""Hooks into what MLflow stores: they decide where a client may have it read and write."""
