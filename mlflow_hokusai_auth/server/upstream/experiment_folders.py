"""The folders of MLflow's experiments in this process's memory, which decide on artifact paths.

Any process of the server may create an experiment. Before a process refuses a path that is in no known
folder, it therefore reads the folders again: a new folder counts everywhere from the first request
that depends on it. No other request waits for the database.
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
from mlflow_hokusai_auth.server import caller as callers

from .artifact_roots import DEFAULT_ROOT, TRACKING

_log = logging.getLogger(__name__)


class ExperimentFolders:
    """Reads the folders of experiments from MLflow's database and keeps them in `known`."""

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
        #: The locations from the database, and their folders: one value, which threads replace.
        self._read: tuple[frozenset[str], Folders] = (frozenset(), self._empty)
        self._reading = threading.Lock()
        self._began = float("-inf")

    @property
    def known(self) -> Folders:
        """The folders of the last reading."""
        return self._read[1]

    def begin(self) -> None:
        """Read the folders for the first time; if the database fails, log that.

        The caller waits for it, because the process may fork soon after (see `wsgi_gate`).
        """
        try:
            self.read()
        except Exception as error:
            _log.warning("The folders of experiments were not read: %s", redact(str(error)))

    def read(self) -> None:
        """Read the folders, unless another thread began to read them after this call.

        Blocks. Raises SQLAlchemyError or MlflowException if the database fails.
        """
        from . import tables

        database = self._environ.get(TRACKING, "")
        if not tables.is_database(database):
            return
        called = self._timer()
        # One thread reads at a time, and the threads that wait use its result.
        with self._reading:
            if self._began > called:
                return
            began = self._timer()
            with tables.connect(database) as connection:
                self.read_by(connection)
            self._began = began

    @callers.seeing_all("the folders of all experiments")
    def read_by(self, connection: Connection) -> Folders:
        """Read the folders by a connection to the database of experiments, and return them."""
        from . import tables

        default_root = self._environ.get(DEFAULT_ROOT, "")
        uris = frozenset(map(str, tables.chosen_folders(connection, default_root)))
        before, folders = self._read
        if not uris >= before:
            before, folders = frozenset(), self._empty
        if new := uris - before:
            folders = folders.adding(new, self._roots)
        self._read = (uris, folders)
        return folders
