"""Types for the fields of `settings.Settings`, with their validation."""

from __future__ import annotations

import ssl
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, SecretStr
from pydantic_settings import NoDecode

from mlflow_hokusai_auth.core import contact
from mlflow_hokusai_auth.core.addresses import networks
from mlflow_hokusai_auth.core.locations import read, read_root
from mlflow_hokusai_auth.core.operations import rules


def _split(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _check_backends(value: tuple[str, ...]) -> tuple[str, ...]:
    if value not in (("local",), ("service",), ("local", "service")):
        raise ValueError("must be local, service or local,service")
    return value


def _check_networks(value: tuple[str, ...]) -> tuple[str, ...]:
    networks(value)
    return value


def _check_bind(value: str) -> str:
    host, _, port = value.rpartition(":")
    if value and not (host and port.isdecimal() and 0 < int(port[:6]) < 65536):
        raise ValueError("must look like 127.0.0.1:9464")
    return value


def _check_url(value: str) -> str:
    parts = urlsplit(value)
    plain = not (parts.query or parts.fragment or parts.username or parts.password)
    if value and (parts.scheme not in ("http", "https") or not parts.hostname or not plain):
        raise ValueError("must look like https://auth.example.com")
    try:
        _ = parts.port
    except ValueError:
        raise ValueError("has a port that is not a number up to 65535") from None
    return value.rstrip("/")


def _check_public_urls(value: tuple[str, ...]) -> tuple[str, ...]:
    for url in value:
        loopback = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        if not url.startswith("https://") and not loopback:
            raise ValueError("must be https, or http on this machine")
    return tuple(_check_url(url) for url in value)


def _check_ca_bundle(value: str) -> str:
    if value:
        try:
            ssl.create_default_context(cafile=value)
        except OSError as error:  # ssl.SSLError is a subclass.
            raise ValueError(f"must name a file of certificates: {error.strerror}") from None
    return value


def _check_secret(value: SecretStr) -> SecretStr:
    if 0 < len(value.get_secret_value()) < 32:
        raise ValueError("must have 32 characters or more")
    return value


def _check_contact(value: str) -> str:
    value = value.strip()
    if problem := contact.problem(value):
        raise ValueError(problem)
    return value


def _check_prefixes(value: tuple[str, ...]) -> tuple[str, ...]:
    for prefix in value:
        segments = prefix.split("/")
        plain = prefix.isascii() and not set(prefix) & set("%?#\\; ")
        if segments[0] or not all(segments[1:]) or not plain or {".", ".."} & set(segments):
            raise ValueError(f"{prefix!r} must look like /mlflow or /api/mlflow")
        if any(f" {prefix}/" in operation.rule for operation in rules()):
            raise ValueError(f"MLflow has routes of its own below {prefix}")
    return value


def _check_roots(value: tuple[str, ...]) -> tuple[str, ...]:
    for root in value:
        location = read(root)
        if location.scheme != "file":
            try:
                read_root(root)
            except ValueError as error:
                raise ValueError(f"{location} {error}") from None
        elif location.odd or not location.parts:
            why = location.odd or "this root would hold every file of this machine"
            raise ValueError(f"{root!r} must look like s3://bucket/folder or /folder: {why}")
    return value


CommaList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Backends = Annotated[CommaList, AfterValidator(_check_backends)]
PublicUrls = Annotated[CommaList, AfterValidator(_check_public_urls)]
Roots = Annotated[CommaList, AfterValidator(_check_roots)]
Networks = Annotated[CommaList, AfterValidator(_check_networks)]
Prefixes = Annotated[CommaList, AfterValidator(_check_prefixes)]
Bind = Annotated[str, AfterValidator(_check_bind)]
CaBundle = Annotated[str, AfterValidator(_check_ca_bundle)]
Contact = Annotated[str, AfterValidator(_check_contact)]
Url = Annotated[str, AfterValidator(_check_url)]
Secret = Annotated[SecretStr, AfterValidator(_check_secret)]
