"""Hooks that refuse a location where a client must not make MLflow read or write."""
