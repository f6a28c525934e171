"""Checks of the locations in MLflow's rows, which decide where clients may have it read and write."""
