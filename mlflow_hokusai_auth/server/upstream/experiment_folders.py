"""The folders of MLflow's experiments, which paths of artifacts are judged by, kept in this process.

Experiments are made by any process that serves. So the folders are read anew before a request is
refused for a path that is in none of those that are known here: a new experiment's counts everywhere
with the first request that depends on it. Nothing else waits for the database.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from mlflow_hokusai_auth.core.folders import BY_NUMBER, Folders
from mlflow_hokusai_auth.core.keys import redact
from mlflow_hokusai_auth.core.locations import Roots

from .artifact_roots import DEFAULT_ROOT

#: What `mlflow server` tells its workers of its options.
TRACKING = "_MLFLOW_SERVER_FILE_STORE"

_log = logging.getLogger(__name__)


class ExperimentFolders:
    """Reads the folders of experiments from MLflow's database, and keeps them in `known`."""

    def __init__(
        self,
        roots: Roots | None = None,
        environ: Mapping[str, str] = os.environ,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._roots = roots or Roots(())
        self._environ = environ
        self._timer = timer
        self._empty = Folders(roots.served, roots.base) if roots else BY_NUMBER
        #: The locations that were read, and the folders that they are. One value: threads replace it.
        self._read: tuple[frozenset[str], Folders] = (frozenset(), self._empty)
        self._reading = threading.Lock()
        self._began = float("-inf")

    @property
    def known(self) -> Folders:
        """The folders as they were read last."""
        return self._read[1]

    def begin(self) -> None:
        """Read them for the first time, in a thread."""
        # Its lock may be held at the moment.
        os.register_at_fork(after_in_child=self._forget_lock)
        threading.Thread(target=self._try, name="hokusai-auth-folders", daemon=True).start()

    def read(self) -> None:
        """Read them from the database, unless somebody has done so since this was called.

        Blocks. Raises SQLAlchemyError or MlflowException if the database fails.
        """
        from mlflow.store.db.db_types import DATABASE_ENGINES
        from mlflow.store.db.utils import create_sqlalchemy_engine

        database = self._environ.get(TRACKING, "")
        # MLflow's store of files is no database.
        if not database.startswith(tuple(DATABASE_ENGINES)):
            return
        called = self._timer()
        # One at a time, which those who wait take for theirs.
        with self._reading:
            if self._began > called:
                return
            began = self._timer()
            engine = create_sqlalchemy_engine(database)
            try:
                with engine.connect() as connection:
                    self.read_by(connection)
            finally:
                engine.dispose()
            self._began = began

    def read_by(self, connection: Connection) -> Folders:
        """Read them by a connection to the database of experiments; returns what was read."""
        uris = frozenset(str(uri) for (uri,) in connection.execute(self._query()) if uri)
        before, known = self._read
        if not uris >= before:
            before, known = frozenset(), self._empty
        if new := uris - before:
            known = known.adding(new, self._roots)
        self._read = (uris, known)
        return known

    def _try(self) -> None:
        try:
            self.read()
        except Exception as error:
            _log.warning("The folders of experiments were not read: %s", redact(str(error)))

    def _forget_lock(self) -> None:
        self._reading = threading.Lock()

    def _query(self) -> sa.Select[tuple[str]]:
        """The statement for the locations that MLflow did not make up by an experiment's number."""
        from mlflow.store.tracking.dbmodels.models import SqlExperiment
        from mlflow.utils.uri import append_to_uri_path, resolve_uri_if_local

        query = sa.select(SqlExperiment.artifact_location)
        default = self._environ.get(DEFAULT_ROOT, "")
        root = resolve_uri_if_local(default).rstrip("/") + "/"
        if not default or append_to_uri_path(root, "1") != f"{root}1":
            return query
        # What it makes up is judged without a look-up, and most locations are of that kind.
        number = sa.cast(SqlExperiment.experiment_id, sa.String(20))
        return query.where(SqlExperiment.artifact_location != sa.literal(root) + number)
