"""What things cost: `make bench`."""

import os
import tempfile

# As under `mlflow server`, where processes add up their counts; to be set before anything is imported.
os.environ.setdefault(
    "PROMETHEUS_MULTIPROC_DIR", tempfile.mkdtemp(prefix="hokusai-auth-metrics-bench-")
)
