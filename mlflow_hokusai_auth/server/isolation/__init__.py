"""The hooks that keep suppliers apart in MLflow's data, and artifacts in the server's roots."""
