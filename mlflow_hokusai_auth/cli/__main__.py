"""`python -m mlflow_hokusai_auth.cli`, for machines without the script on the path."""

from . import main

main(prog_name="hokusai-auth")
