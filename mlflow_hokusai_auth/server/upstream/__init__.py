"""Everything that knows the insides of MLflow and of its web servers: the list for an upgrade."""
