"""Reports about requests: the decision log, metrics and traces."""
