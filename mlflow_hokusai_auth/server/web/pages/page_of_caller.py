"""A page for somebody who is signed in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlflow_hokusai_auth.server.web import keys_api

from . import forms, shared

if TYPE_CHECKING:
    from werkzeug.wrappers import Response

    from mlflow_hokusai_auth.server.gate.gate import Gate
    from mlflow_hokusai_auth.store.keys import LocalStore


def page_of_caller(
    store: LocalStore, gate: Gate, template: str, status: int = 200, **values: Any
) -> Response:
    """Return a page with the values of `of_caller`."""
    return shared.page(template, status, **values, **of_caller(store, gate))


def of_caller(store: LocalStore, gate: Gate) -> dict[str, Any]:
    """Return `me`, who is signed in; `csrf`, which forms hold; and `said`, what was done."""
    return {"me": keys_api.whoami_of(store, gate), "csrf": forms.csrf(), "said": forms.said()}
