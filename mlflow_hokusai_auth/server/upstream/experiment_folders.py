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

from sqlalchemy.engine import Connection

from mlflow_hokusai_auth.core.folders import BY_NUMBER, Folders
from mlflow_hokusai_auth.core.keys import redact
from mlflow_hokusai_auth.core.locations import Roots

from .artifact_roots import DEFAULT_ROOT, TRACKING

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
        from . import tables

        database = self._environ.get(TRACKING, "")
        if not tables.is_database(database):
            return
        called = self._timer()
        # One at a time, which those who wait take for theirs.
        with self._reading:
            if self._began > called:
                return
            began = self._timer()
            with tables.connect(database) as connection:
                self.read_by(connection)
            self._began = began

    def read_by(self, connection: Connection) -> Folders:
        """Read them by a connection to the database of experiments; returns what was read."""
        from . import tables

        default_root = self._environ.get(DEFAULT_ROOT, "")
        uris = frozenset(map(str, tables.chosen_folders(connection, default_root)))
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
