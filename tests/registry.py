"""What a server keeps, all of it: to compare what was there before a fault with what is after it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import requests

API = "/api/2.0/mlflow"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"


class Registry:
    """Reads the server at `uri`, a tracking URI, with `key` (None: without)."""

    def __init__(self, uri: str, key: str | None = None) -> None:
        self._uri = uri
        self._session = requests.Session()
        if key is not None:
            self._session.headers["X-API-Key"] = key

    def contents(self) -> dict[str, Any]:
        """Models, versions and aliases; experiments and runs with what was logged; artifacts' digests.

        What changes by looking, such as times, is not in it, and what was begun before is not sorted
        out: whoever compares does that.
        """
        experiments = {e["experiment_id"]: e["name"] for e in self._experiments()}
        return {
            "models": {
                m["name"]: sorted((a["alias"], a["version"]) for a in m.get("aliases", ()))
                for m in self._all("GET", "registered-models/search", "registered_models")
            },
            "versions": {
                (v["name"], v["version"]): (v["status"], v.get("source"), v.get("run_id"))
                for v in self._all("GET", "model-versions/search", "model_versions")
            },
            "experiments": experiments,
            "runs": dict(self._runs(list(experiments))),
            "artifacts": dict(self._artifacts("")),
        }

    def _experiments(self) -> Iterator[dict[str, Any]]:
        return self._all("POST", "experiments/search", "experiments", max_results=1000)

    def _runs(self, experiments: list[str]) -> Iterator[tuple[str, Any]]:
        wanted = {"experiment_ids": experiments, "max_results": 1000}
        for run in self._all("POST", "runs/search", "runs", **wanted):
            data = run["data"]
            logged = {
                name: sorted((item["key"], item["value"]) for item in data.get(name, ()))
                for name in ("metrics", "params", "tags")
            }
            yield run["info"]["run_id"], (run["info"]["status"], logged)

    def _artifacts(self, path: str) -> Iterator[tuple[str, str]]:
        listed = self._session.get(self._uri + ARTIFACTS, params={"path": path}, timeout=60)
        listed.raise_for_status()
        for file in listed.json().get("files", ()):
            inside = f"{path}/{file['path']}".lstrip("/")
            if file["is_dir"]:
                yield from self._artifacts(inside)
            else:
                got = self._session.get(f"{self._uri}{ARTIFACTS}/{inside}", timeout=60)
                got.raise_for_status()
                yield inside, hashlib.sha256(got.content).hexdigest()

    def _all(self, method: str, call: str, field: str, **fields: Any) -> Iterator[dict[str, Any]]:
        token = ""
        while True:
            asked = {**fields, **({"page_token": token} if token else {})}
            how = {"params": asked} if method == "GET" else {"json": asked}
            answer = self._session.request(method, f"{self._uri}{API}/{call}", timeout=60, **how)
            answer.raise_for_status()
            page = answer.json()
            yield from page.get(field, ())
            token = page.get("next_page_token", "")
            if not token:
                return
