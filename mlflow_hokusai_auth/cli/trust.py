"""`hokusai-auth trust`: the workloads that get keys for their identity tokens, by the rules of REST."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

import click

from .output import (
    WrongValue,
    body_of,
    date,
    json_option,
    print_json,
    print_table,
    seconds,
    undo,
)
from .store import actor, lifetimes, opened, server

_MODELS = click.option(
    "--models",
    multiple=True,
    metavar="PATTERN",
    help="A registered model that the keys may change, or a beginning and `*`, such as `acme-*`; may "
    "be repeated.",
)
_TTL = click.option(
    "--ttl", metavar="TIME", help="Lifetime of a key: 15m (the default), 1h at most."
)
_JWKS = click.option(
    "--jwks",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="The issuer's key set (JSON), which is stored: for networks without a way to the issuer.",
)
_URL = click.option(
    "--url",
    metavar="URL",
    help="Ask this server, with your key, instead of the key store on this host. In this way suppliers "
    "manage their own trusts, where the server allows it.",
)


@click.group()
def trust() -> None:
    """Exchange identity tokens of CI jobs and other workloads for keys that live for minutes."""


@trust.command("add")
@click.option("--owner", help="The owner of the keys. Suppliers leave it out.")
@click.option("--scope", "scopes", multiple=True, required=True, help="A scope; may be repeated.")
@click.option("--github", metavar="ORG/REPO", help="A repository on GitHub.")
@click.option("--gitlab", metavar="GROUP/PROJECT", help="A project on GitLab.")
@click.option("--issuer", metavar="URL", help="An issuer: the exact text of the claim iss.")
@click.option("--workflow", metavar="FILE", help="The workflow's file, such as release.yml.")
@click.option("--environment", metavar="NAME", help="The environment of the job.")
@click.option(
    "--claim",
    "claims",
    multiple=True,
    metavar="NAME=VALUE",
    help="A claim and its exact value, or a beginning and `*`; may be repeated.",
)
@click.option(
    "--single-use/--reusable",
    default=None,
    help="Exchange each token once only, or until it ends (default: as the issuer mints them).",
)
@_TTL
@_MODELS
@click.option("--no-delete", is_flag=True, default=None, help="The keys may not delete anything.")
@_JWKS
@_URL
@json_option
def add_trust(url: str | None, as_json: bool, claims: tuple[str, ...], **given: Any) -> None:
    """Trust a workload: its jobs get keys with these scopes, without a secret."""
    body = _body(given)
    if claims:
        body["claims"] = _claims(claims)
    if url is not None:
        with server(url) as client:
            described = client.add_trust(body.pop("owner", None), body.pop("scopes"), **body)
        _show(described, as_json)
        _warn(described)
        return
    if "owner" not in body:
        raise WrongValue(
            "--owner names the owner of the keys. A supplier gives --url, the server's, instead"
        )
    with opened(make=True) as store:
        from mlflow_hokusai_auth.server import settings
        from mlflow_hokusai_auth.server.web import schemas, trust_api, trust_schemas
        from mlflow_hokusai_auth.store.trusts import Trusts

        new = schemas.parse(trust_schemas.NewTrust, body)
        workload = trust_api.workload(new)
        longest = lifetimes()
        fields = trust_schemas.fields(new, longest)
        record = Trusts(store.database, lifetimes=longest).add(workload, **fields, by=actor())
        described = trust_schemas.describe(record)
    _show(described, as_json)
    if not settings.load().public_urls:
        click.echo(
            "hokusai-auth: HOKUSAI_AUTH_PUBLIC_URLS is not set here. Without it in the server's "
            "environment, no job gets a key (MISCONFIGURED)",
            err=True,
        )
    _warn(described)


@trust.command("list")
@_URL
@json_option
def list_trusts(url: str | None, as_json: bool) -> None:
    """List all trusts, oldest first; with a supplier's key and --url, those of its owner."""
    if url is not None:
        with server(url) as client:
            rows = client.list_trusts()
    else:
        with opened() as store:
            from mlflow_hokusai_auth.server.web.trust_schemas import describe
            from mlflow_hokusai_auth.store.trusts import Trusts

            rows = [describe(record) for record in Trusts(store.database).each()]
    if as_json:
        print_json({"trusts": rows})
    else:
        print_table([_row(row) for row in rows])


@trust.command("edit")
@click.argument("trust_id")
@click.option("--scope", "scopes", multiple=True, help="A scope; may be repeated.")
@_TTL
@_MODELS
@click.option("--any-model", is_flag=True, help="The keys may change models of any name.")
@click.option("--no-delete", is_flag=True, default=None, help="The keys may not delete anything.")
@click.option("--may-delete", is_flag=True, help="The keys may delete.")
@_JWKS
@click.option("--ask-issuer", is_flag=True, help="Forget the stored key set, and ask the issuer.")
@click.option(
    "--forget-ids",
    is_flag=True,
    default=None,
    help="Pin the repository's ids anew at the next exchange, after it was moved or made again.",
)
@_URL
@json_option
def edit_trust(
    trust_id: str,
    url: str | None,
    as_json: bool,
    any_model: bool,
    may_delete: bool,
    ask_issuer: bool,
    **given: Any,
) -> None:
    """Change a trust. Unless only --ttl changes, the keys of its jobs end within a second."""
    body = _body(given)
    undo(
        body,
        ("--models", "--any-model", "models", any_model, []),
        ("--no-delete", "--may-delete", "no_delete", may_delete, False),
        ("--jwks", "--ask-issuer", "jwks", ask_issuer, None),
    )
    if url is not None:
        with server(url) as client:
            described = client.edit_trust(trust_id, **body)
        _show(described, as_json)
        return
    with opened() as store:
        from mlflow_hokusai_auth.server.web import schemas, trust_schemas
        from mlflow_hokusai_auth.store.trusts import Trusts

        changed, forget = trust_schemas.changes(schemas.parse(trust_schemas.TrustChanges, body))
        trusts = Trusts(store.database, lifetimes=lifetimes())
        record = trusts.edit(trust_id, changed, actor(), forget_ids=forget)
        described = trust_schemas.describe(record)
    _show(described, as_json)


@trust.command("remove")
@click.argument("trust_id")
@_URL
@json_option
def remove_trust(trust_id: str, url: str | None, as_json: bool) -> None:
    """Remove a trust; the keys that its jobs have now end within a second."""
    if url is not None:
        with server(url) as client:
            described = client.remove_trust(trust_id)
        _show(described, as_json)
        return
    with opened() as store:
        from mlflow_hokusai_auth.server.web.trust_schemas import describe
        from mlflow_hokusai_auth.store.trusts import Trusts

        described = describe(Trusts(store.database).remove(trust_id, actor()))
    _show(described, as_json)


def _warn(described: Mapping[str, Any]) -> None:
    """Warn if more people than those who release get keys."""
    from mlflow_hokusai_auth.core.trust_words import warning

    if text := warning(described["kind"], described["claims"]):
        click.echo(
            f"hokusai-auth: {text} --environment names an environment, which GitHub protects.",
            err=True,
        )


def _body(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given options as the body of a REST request."""
    body = body_of(given)
    if (lifetime := body.get("ttl")) is not None:
        body["ttl"] = seconds(lifetime, "--ttl")
    if (file := body.get("jwks")) is not None:
        body["jwks"] = _key_set(file)
    return body


def _key_set(file: IO[str]) -> object:
    from mlflow_hokusai_auth.server.web.trust_schemas import MAX_JWKS

    try:
        return json.loads(file.read(MAX_JWKS + 1))
    except (ValueError, RecursionError):
        raise WrongValue(f"--jwks: the file must be JSON of at most {MAX_JWKS} bytes") from None


def _claims(texts: tuple[str, ...]) -> dict[str, str]:
    claims: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name in claims:
            raise WrongValue("--claim takes NAME=VALUE, each name once")
        claims[name] = value
    return claims


def _row(described: Mapping[str, Any]) -> dict[str, object]:
    return {
        **{name: described[name] for name in ("trust_id", "owner", "kind")},
        "claims": [f"{name}={value}" for name, value in described["claims"].items()],
        "scopes": described["scopes"],
        "models": described["models"],
        "ttl": f"{described['ttl']:.0f}s",
        "exchanges": described["exchanges"],
        "last used": date(described["last_used_at"]),
    }


def _show(described: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(described)
    else:
        print_table([_row(described)])
