"""`python -m mlflow_hokusai_auth.cli`, where the script is not on the path."""

from . import main

main(prog_name="hokusai-auth")
