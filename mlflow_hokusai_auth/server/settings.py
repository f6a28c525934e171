"""Every setting of the server: `HOKUSAI_AUTH_<NAME>` in the environment, read once at start."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as UnreadableError

from mlflow_hokusai_auth.core.errors import SettingsError
from mlflow_hokusai_auth.core.forwarding import HeaderPolicy
from mlflow_hokusai_auth.core.lifetimes import Lifetimes
from mlflow_hokusai_auth.core.policy import Policy
from mlflow_hokusai_auth.core.types import Access

from .setting_types import (
    Backends,
    Bind,
    CaBundle,
    CommaList,
    Contact,
    Networks,
    Prefixes,
    PublicUrls,
    Roots,
    Secret,
    Url,
)

PREFIX = "HOKUSAI_AUTH_"
#: The folder in which Docker and Kubernetes put secrets: a file for each, named like the variable, in
#: lower case.
SECRETS = Path("/run/secrets")
#: The variables that Kubernetes sets in each pod beside a Service named hokusai-auth.
_KUBERNETES = re.compile(PREFIX + r"(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_\w+)?)")


#: Seconds: 20 years.
MAX_KEY_LIFETIME = 20 * 365 * 86400


def _hokusai_alias(name: str, *others: str, default: Any = (), description: str) -> Any:
    """Return a field that is also read under the names which other Hokusai services use for it."""
    names = AliasChoices(PREFIX + name, *({name, *others} - {"SERVICE_URL", "SERVICE_ID"}))
    return Field(default, validation_alias=names, description=description)


class Settings(BaseSettings):
    """The server's settings. Make them with `load`, which also reports misspelt names."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="ignore", hide_input_in_errors=True
    )

    mode: Literal["enforce", "observe", "off"] = Field(
        "enforce",
        description="enforce: refuse; observe: only log requests that would be refused; off: check "
        "nothing. `hokusai-auth mode` overrides it, also while the server runs.",
    )
    force_mode: Literal["", "enforce", "observe", "off"] = Field(
        "",
        description="The mode that overrides `hokusai-auth mode`. The last resort: with off, the "
        "server starts even if its key store can't be reached.",
    )
    isolation: Literal["", "off", "observe", "writes", "full"] = Field(
        "",
        description="writes: a key with model:* scopes changes only what its owner made, or may "
        "contribute to; full: it also sees only that, and what was shared with it; observe: only log "
        "and count other changes; off: nothing. Unset: as decided when the server first used MLflow's "
        "database, which is full if everything in it had an owner, and otherwise observe; off where "
        "owners can't be recorded. It counts while the mode is enforce. `hokusai-auth isolation` "
        "overrides it, also while the server runs.",
    )
    backend: Backends = Field(
        ("local",),
        description="The authorities that look up a key, in this order: local (the key store), "
        "service (the Hokusai auth service), or local,service.",
    )
    database_uri: SecretStr = Field(
        SecretStr("sqlite:///hokusai_auth.db"),
        description="SQLAlchemy URL of the key store: an SQLite file or a PostgreSQL database.",
    )
    policy: Literal["scopes", "authenticated", "admin"] = Field(
        "scopes",
        description="The permissions of a good key. scopes: those of its scopes; authenticated: read "
        "and write; admin: none, except for an administrator's key.",
    )
    empty_scopes: Literal["read", "none", "write"] = Field(
        "read", description="The permissions of a key without any scope."
    )
    registry_admin_emails: CommaList = _hokusai_alias(
        "REGISTRY_ADMIN_EMAILS",
        "REGISTRY_ADMIN_USER_EMAILS",
        "REGISTRY_ADMIN_USER_EMAIL",
        description="Users of the auth service who are administrators here.",
    )
    registry_admin_scopes: CommaList = _hokusai_alias(
        "REGISTRY_ADMIN_SCOPES", description="Further scopes that make an administrator."
    )
    registry_admin_roles: CommaList = _hokusai_alias(
        "REGISTRY_ADMIN_ROLES",
        description="Roles of the auth service that make an administrator. None by default, as the "
        "role admin of any organisation would make one.",
    )
    assistant: bool = Field(
        False,
        description="Whether MLflow's assistant answers administrators. It runs programs on the "
        "server's host.",
    )
    service_url: Url = _hokusai_alias(
        "SERVICE_URL",
        "AUTH_SERVICE_URL",
        default="",
        description="URL of the auth service, such as https://auth.hokus.ai, without the path.",
    )
    service_id: str = _hokusai_alias(
        "SERVICE_ID",
        "AUTH_SERVICE_ID",
        default="platform",
        description="This server's id at the auth service. With a wrong id, the service rejects every "
        "key.",
    )
    service_timeout: float = Field(
        5.0, gt=0, le=60, description="Seconds that one lookup in the auth service may take in all."
    )
    service_ca_bundle: CaBundle = Field(
        "",
        description="File of certificates to trust for the auth service in place of the usual ones.",
    )
    service_environment_proxies: bool = Field(
        False, description="Whether HTTPS_PROXY and the like are used to reach the auth service."
    )
    cache_ttl: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="Seconds for which a verified key is remembered. Revocation in the key store "
        "takes effect within a second all the same.",
    )
    negative_cache_ttl: float = Field(
        5.0,
        ge=0,
        le=60,
        description="Seconds for which a key that its authority rejects is remembered.",
    )
    stale_if_error: float = Field(
        0.0,
        ge=0,
        le=86400,
        description="Seconds beyond cache_ttl for which a verified key still works while its authority "
        "does not answer. Revocation in the auth service may then take as long.",
    )
    redis_url: SecretStr = Field(
        SecretStr(""),
        description="URL of the Redis that shares verified keys of the auth service, and the counts "
        "for rate limits, between processes and hosts: rediss:// (verified TLS) or redis://.",
    )
    secret_key: Secret = Field(
        SecretStr(""),
        description="Secret of this installation, 32 characters or more, the same on every host. "
        "Needed with redis_url; otherwise the server makes one at each start.",
    )
    trusted_proxies: Networks = Field(
        (),
        description="Addresses and networks, comma-separated, of the proxies whose X-Forwarded-For "
        "the server trusts.",
    )
    prefixes: Prefixes = Field(
        ("/mlflow", "/api/mlflow"),
        description="Prefixes, comma-separated: paths under which the whole server answers as well.",
    )
    artifact_roots: Roots = Field(
        (),
        description="Folders and buckets, comma-separated, in which the server may read and write "
        "artifacts, besides `--artifacts-destination` and `--default-artifact-root`: "
        "s3://bucket/folder or /folder. Only administrators can store experiments and model versions "
        "elsewhere, and the server does not open them.",
    )
    failures_per_minute: int = Field(
        60,
        ge=0,
        description="Requests with a wrong key that one address may send in a minute; 0: no limit. "
        "Beyond that, the address gets 429 without a lookup for up to a minute. Keys that this worker "
        "process found good within the last day still work.",
    )
    public_urls: PublicUrls = Field(
        (),
        description="URLs, comma-separated, at which clients reach the server, such as "
        "https://registry.example.com. An identity token must name one of them as its audience to be "
        "exchanged for a key. One-time links begin with the first URL, and open at these only. Unset: "
        "no token is exchanged, and there are no links. The Host header never counts.",
    )
    supplier_trust: bool = Field(
        False,
        description="Whether suppliers manage the trusts of their own owner: for repositories on "
        "github.com and gitlab.com, with at most the rights of their own key. false: only "
        "administrators manage trusts.",
    )
    session_lifetime: float = Field(
        43200.0,
        gt=0,
        le=31 * 86400,
        description="Seconds for which a browser's session lasts; then the user must sign in again.",
    )
    key_lifetime: int = Field(
        365 * 86400,
        ge=0,
        le=MAX_KEY_LIFETIME,
        description="The lifetime of a new key without an expiry, in seconds: 365 days. 0: for ever. "
        "Existing and imported keys keep their expiry.",
    )
    key_lifetime_max: int = Field(
        0,
        ge=0,
        le=MAX_KEY_LIFETIME,
        description="The longest lifetime of a new key, in seconds. 0: no maximum. It also bounds the "
        "default lifetime, every new expiry of a key, and the keys of trusts, also of those that were "
        "added before. Existing and imported keys keep their expiry.",
    )
    contact: Contact = Field(
        "",
        description="The contact for people who need a key, or have a question about theirs: a text, a "
        "mail address or an https URL, of at most 200 characters. The sign-in page and refusals show "
        "it to everybody; the page of one's own key and `hokusai-auth whoami` show it, too.",
    )
    leak_public_keys: str = Field(
        "",
        description="File with the public keys of GitHub's secret scanning, in the form of its API. A "
        "report of a leaked key must have a signature by one of them. Without the file, the server "
        "accepts no reports.",
    )
    log_reads: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share (0 to 1) of read-only requests that the decision log records. It always "
        "records refusals, failures and changes.",
    )
    metrics_bind: Bind = Field(
        "",
        description="Address, such as 127.0.0.1:9464, that serves the metrics without a key. With the "
        "scope metrics:read, a key can always read them at /hokusai/metrics.",
    )
    shortcut: bool = Field(
        True,
        description="Whether requests for MLflow's Flask routes bypass its FastAPI application, which "
        "is faster and gives the same answers.",
    )
    protected_aliases: CommaList = Field(
        (),
        description="Aliases of registered models, comma-separated, such as champion,production, that "
        "only staff may set, move or remove, while isolation is writes or full. Suppliers neither "
        "delete the version that such an alias points to, nor delete or rename its model.",
    )
    provenance: bool = Field(
        True,
        description="Whether MLflow's pages say who made something: the server tags experiments, runs, "
        "logged models, models and versions with the owner and the id of the key.",
    )
    interceptor_errors: Literal["ignore", "refuse"] = Field(
        "ignore", description="Whether an exception in an interceptor refuses the request."
    )
    forward_headers: CommaList = Field(
        ("*",),
        description="Headers of a request that MLflow gets, comma-separated; x-* means every header "
        "that begins with x-. By default MLflow gets all headers unchanged: stripping some of them "
        "broke registration once.",
    )
    remove_headers: CommaList = Field(
        (), description="Headers that MLflow does not get, in the same form."
    )
    debug_headers: bool = Field(
        False,
        description="Whether to log the names of each request's headers, and of those that MLflow "
        "gets, with fingerprints of credentials.",
    )
    query_key: bool = Field(
        True,
        description="Whether a key in ?api_key= is accepted. It is removed from the query either way.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        if "service" in self.backend and not self.service_url:
            raise ValueError("HOKUSAI_AUTH_BACKEND=service needs HOKUSAI_AUTH_SERVICE_URL")
        if self.redis_url.get_secret_value() and not self.secret_key.get_secret_value():
            raise ValueError("HOKUSAI_AUTH_REDIS_URL needs HOKUSAI_AUTH_SECRET_KEY")
        headers = header_policy_of(self)
        if headers is not None and (problem := headers.problem()):
            raise ValueError(f"HOKUSAI_AUTH_FORWARD_HEADERS, _REMOVE_HEADERS: {problem}")
        return self


def load(secrets: Path = SECRETS) -> Settings:
    """Read the settings from the environment and, if a variable is missing, from a file in `secrets`.

    Raises SettingsError, which names every wrong setting.
    """
    problems = [_unknown(name) for name in sorted(os.environ) if name.startswith(PREFIX)]
    settings = None
    try:
        settings = Settings(_secrets_dir=secrets if secrets.is_dir() else None)
    except UnreadableError as error:
        problems.append(f"{error}: {error.__cause__}")
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=False, include_context=False):
            message = item["msg"].removeprefix("Value error, ")
            name = str(item["loc"][0]) if item["loc"] else ""
            if name in Settings.model_fields:
                name = PREFIX + name.upper()
            problems.append(f"{name}: {message}" if name else message)
    messages = [problem for problem in problems if problem]
    if settings is None or messages:
        raise SettingsError("; ".join(messages))
    return settings


def header_policy_of(settings: Settings) -> HeaderPolicy | None:
    """Return the rules for the headers that MLflow gets, or None if it gets all of them."""
    lists = (settings.forward_headers, settings.remove_headers)
    policy = HeaderPolicy(*(tuple(name.lower() for name in names) for names in lists))
    return None if policy == HeaderPolicy() else policy


def lifetimes_of(settings: Settings) -> Lifetimes:
    """Return how long keys live."""
    return Lifetimes(settings.key_lifetime or None, settings.key_lifetime_max or None)


def policy_of(settings: Settings, static_files: frozenset[str] = frozenset()) -> Policy:
    """Return the part of the settings that decisions depend on.

    `static_files` are the paths of MLflow's own static files, which need no key.
    """
    empty = {"none": Access.PUBLIC, "read": Access.READ, "write": Access.WRITE}
    return Policy(
        query_key=settings.query_key,
        kind=settings.policy,
        empty_scopes=empty[settings.empty_scopes],
        admin_emails=frozenset(email.casefold() for email in settings.registry_admin_emails),
        admin_scopes=frozenset(settings.registry_admin_scopes),
        admin_roles=frozenset(settings.registry_admin_roles),
        assistant=settings.assistant,
        supplier_trust=settings.supplier_trust,
        static_files=static_files,
    )


def _unknown(variable: str) -> str | None:
    if _KUBERNETES.fullmatch(variable):
        return None
    name = variable.removeprefix(PREFIX).lower()
    if name in Settings.model_fields:
        return None
    close = difflib.get_close_matches(name, Settings.model_fields, n=1)
    hint = f"did you mean {PREFIX}{close[0].upper()}?" if close else "no such setting"
    return f"{variable}: {hint}"
