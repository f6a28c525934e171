"""The HTTP surface of this package beside MLflow's: REST, pages, health."""
