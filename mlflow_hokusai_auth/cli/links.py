"""One-time links to keys: `keys create --link` and `keys rotate --link`, and `hokusai-auth links`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from .output import F, WrongValue, date, json_option, print_json, print_table, seconds
from .store import actor, opened

if TYPE_CHECKING:
    from mlflow_hokusai_auth.store.keys import LocalStore


def link_options(command: F) -> F:
    """Add --link and --link-expires, the parameters `link` and `link_expires`."""
    expires = click.option(
        "--link-expires",
        metavar="TIME",
        help="With --link: the time for which it can be opened (default: 24h), 7d at most.",
    )
    link = click.option(
        "--link",
        is_flag=True,
        help="Make a one-time link instead of a key: whoever opens it first gets the key, which is "
        "made at that moment.",
    )
    return link(expires(command))


def lasting(link: bool, link_expires: str | None) -> dict[str, float]:
    """Return the `expires_in` of the body of a new link, if one is given."""
    if link_expires is None:
        return {}
    if not link:
        raise click.UsageError("--link-expires needs --link.")
    return {"expires_in": seconds(link_expires, "--link-expires")}


def make(store: LocalStore, body: Mapping[str, Any], *, as_json: bool) -> None:
    """Make the link that `body` describes, as the REST API has it, and print it."""
    from mlflow_hokusai_auth.server import settings
    from mlflow_hokusai_auth.server.web.link_schemas import describe
    from mlflow_hokusai_auth.server.web.links_api import LinkMaker
    from mlflow_hokusai_auth.store.links import MAX_LIFETIME, Links

    if body.get("expires_in", 0.0) > MAX_LIFETIME:
        raise WrongValue("--link-expires takes 7d at most")
    config = settings.load()
    maker = LinkMaker(Links(store.database), config.public_urls, settings.lifetimes_of(config))
    link, url = maker.make(body, actor())
    if as_json:
        print_json({**describe(link), "url": url})
        return
    click.echo(url)
    click.echo(
        f"This is {link.link_id}, for {link.owner}. It can be opened once, until "
        f"{date(link.expires_at)}. `hokusai-auth links revoke {link.link_id}` revokes it.",
        err=True,
    )


@click.group()
def links() -> None:
    """Manage one-time links to keys; `keys create --link` and `keys rotate --link` make them."""


@links.command("list")
@json_option
def list_links(as_json: bool) -> None:
    """List one-time links, newest first. Each stays for 30 days after it has expired, opened or not."""
    with opened() as store:
        from mlflow_hokusai_auth.server.web.link_schemas import describe
        from mlflow_hokusai_auth.store.links import Links

        described = [describe(link) for link in Links(store.database).each()]
    if as_json:
        print_json({"links": described})
    else:
        print_table([_row(link) for link in described])


@links.command()
@click.argument("link_id")
@json_option
def revoke(link_id: str, as_json: bool) -> None:
    """Revoke a link, so that nobody can open it.

    The key of an opened link goes on: end it with `keys revoke`.
    """
    with opened() as store:
        from mlflow_hokusai_auth.server.web.link_schemas import describe
        from mlflow_hokusai_auth.store.links import Links

        described = describe(Links(store.database).revoke(link_id, actor()))
    if as_json:
        print_json(described)
    else:
        print_table([_row(described)])


def _row(link: Mapping[str, Any]) -> dict[str, object]:
    return {
        **{name: link[name] for name in ("link_id", "state", "owner", "name", "replaces")},
        "expires_at": date(link["expires_at"]),
        "opened_at": date(link["opened_at"]),
        "opened from": link["opened_from"],
        "key_id": link["key_id"],
        "refused": link["refused"],
        "last refused": date(link["refused_at"]),
    }
