"""A page for somebody who is signed in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlflow_hokusai_auth.server.web import keys_api

from . import forms, shared

if TYPE_CHECKING:
    from werkzeug.wrappers import Response

    from mlflow_hokusai_auth.server.gate.gate import Gate
    from mlflow_hokusai_auth.store.keys import LocalStore


def page_of_caller(
    store: LocalStore, gate: Gate, template: str, status: int = 200, **values: object
) -> Response:
    """Return a page: `me` is who is signed in, forms hold `csrf`, and `said` is what was done."""
    values |= {"me": keys_api.whoami_of(store, gate), "csrf": forms.csrf(), "said": forms.said()}
    return shared.page(template, status, **values)
