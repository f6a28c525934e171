"""`/api/2.0/hokusai/links`: one-time links to new keys, for administrators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import flask

from mlflow_hokusai_auth.core.denials import full_message
from mlflow_hokusai_auth.core.errors import InvalidRequest, Misconfigured, NotFound
from mlflow_hokusai_auth.core.lifetimes import UNLIMITED, Lifetimes
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.links import LinkRecord, Links

from . import api, schemas
from . import link_schemas as linked

#: The message on a server without a key store, where no link can be kept.
ABSENT = (
    "This server makes no links: its keys are the auth service's alone "
    "(HOKUSAI_AUTH_BACKEND=service)."
)
#: The page that opens links, below a public URL.
PAGE = "/hokusai/link"


@dataclass(frozen=True)
class LinkMaker:
    """Makes links in `links`, below the first of `public_urls`, to keys that live by `lifetimes`."""

    links: Links
    public_urls: Sequence[str]
    lifetimes: Lifetimes = UNLIMITED

    def check(self) -> None:
        """Raise Misconfigured if no public URL is set."""
        if not self.public_urls:
            raise Misconfigured(
                full_message(
                    "MISCONFIGURED",
                    "HOKUSAI_AUTH_PUBLIC_URLS is not set, so nobody knows where a link must lead. "
                    "The operator sets it, for the server and in the shell of `hokusai-auth`, to the "
                    "URL at which clients reach the server.",
                )
            )

    def make(self, body: object, by: Actor) -> tuple[LinkRecord, str]:
        """Make the link that `body` (a `NewLink`) describes. Return its record and the link itself.

        Raises Misconfigured, InvalidRequest, KeyConflict and AuthorityUnavailable.
        """
        self.check()
        asked = schemas.parse(linked.NewLink, body)
        if sum(part is not None for part in (asked.key, asked.replaces)) != 1:
            raise InvalidRequest("Give key or replaces: one of them, not both.")
        if asked.key is not None:
            if asked.overlap is not None:
                raise InvalidRequest("overlap is for links with replaces.")
            fields = schemas.link_fields(asked.key, self.lifetimes)
            link, code = self.links.create(**fields, expires_in=asked.expires_in, by=by)
        else:
            assert asked.replaces is not None
            overlap = {} if asked.overlap is None else {"overlap": asked.overlap}
            link, code = self.links.create_rotation(
                asked.replaces, **overlap, expires_in=asked.expires_in, by=by
            )
        # The fragment is never sent to a server, so no log or proxy on the way sees the code.
        return link, f"{self.public_urls[0]}{PAGE}#{code}"


def blueprint(maker: LinkMaker, *, has_store: bool) -> flask.Blueprint:
    """Return the routes. Without a key store in use (`has_store`) each answers 404."""
    routes = api.blueprint("hokusai_links")

    @routes.before_request
    def refuse_without_store() -> None:
        if not has_store:
            raise NotFound(ABSENT)

    @routes.get("/links")
    def list_links() -> flask.Response:
        return flask.jsonify(links=[linked.describe(link) for link in maker.links.each()])

    @routes.post("/links")
    def create_link() -> tuple[flask.Response, int]:
        link, url = maker.make(api.body(), callers.actor())
        return flask.jsonify(**linked.describe(link), url=url), 201

    @routes.delete("/links/<link_id>")
    def revoke_link(link_id: str) -> flask.Response:
        return flask.jsonify(linked.describe(maker.links.revoke(link_id, callers.actor())))

    return routes
