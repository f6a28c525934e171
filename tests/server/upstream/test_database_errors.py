"""Errors of a database do not show statements and values, which MLflow would hand on to clients."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import sqlalchemy as sa

from mlflow_hokusai_auth.server.upstream import database_errors
from tests.conftest import empty_database


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_error_shows_neither_statement_nor_values(
    request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    database_errors.shorten()
    caplog.set_level(logging.DEBUG, "mlflow_hokusai_auth")
    uri = empty_database(request, kind, tmp_path).replace("postgresql:", "postgresql+psycopg:")
    table = sa.Table("t", sa.MetaData(), sa.Column("secret", sa.String(99), primary_key=True))
    with sa.create_engine(uri).begin() as connection:
        table.create(connection)
        connection.execute(table.insert(), {"secret": "hidden"})
        with pytest.raises(sa.exc.IntegrityError) as refused:
            connection.execute(table.insert(), {"secret": "hidden"})
    for shown in (str(refused.value), repr(refused.value)):
        assert "INSERT" not in shown and "hidden" not in shown
        # The reason stays.
        assert "unique" in shown.lower()
    assert "INSERT INTO t" in caplog.text and "hidden" not in caplog.text


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_error_of_postgresql_shows_no_part_of_a_statement(
    request: pytest.FixtureRequest, tmp_path: Path, driver: str
) -> None:
    """MLflow before 3.17 compares a version's number with a text, which psycopg (3) sends as such."""
    database_errors.shorten()
    uri = empty_database(request, "postgresql", tmp_path).replace("ql:", f"ql+{driver}:")
    compared = sa.cast("hidden", sa.String) == sa.bindparam("secret", 1, sa.Integer)
    with sa.create_engine(uri).begin() as connection, pytest.raises(sa.exc.DBAPIError) as refused:
        connection.execute(sa.select(compared))
    for shown in (str(refused.value), repr(refused.value)):
        assert "LINE" not in shown and "SELECT" not in shown and "hidden" not in shown
        assert "operator does not exist" in shown
