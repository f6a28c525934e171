"""Everything that reports what happened: the decision log, metrics, traces."""
