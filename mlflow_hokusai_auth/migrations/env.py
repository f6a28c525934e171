"""Alembic's environment. It runs on the connection, and in the transaction, of `Database.migrate`."""

from alembic import context

from mlflow_hokusai_auth.store.database import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    version_table=VERSION_TABLE,
    transactional_ddl=False,
)
context.run_migrations()
