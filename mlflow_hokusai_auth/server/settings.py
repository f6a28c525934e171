"""Every setting of the server: `HOKUSAI_AUTH_<NAME>` in the environment, read once, at start."""

from __future__ import annotations

import difflib
import os
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "HOKUSAI_AUTH_"


class SettingsError(Exception):
    """One or more settings are wrong; the message names all of them."""


class Settings(BaseSettings):
    """The server's settings. Build it with `load`, which also catches misspelt names."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="ignore", hide_input_in_errors=True
    )

    database_uri: SecretStr = Field(
        SecretStr("sqlite:///hokusai_auth.db"),
        description="SQLAlchemy URL of the key store: an SQLite file or a PostgreSQL database.",
    )
    cache_ttl: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="Seconds for which a verified key is remembered. Revocation does not wait for "
        "it: that is seen within a second.",
    )
    prefixes: Annotated[tuple[str, ...], NoDecode] = Field(
        ("/mlflow", "/api/mlflow"),
        description="Paths, comma-separated, under which the whole server answers as well.",
    )
    query_key: bool = Field(
        True,
        description="Whether a key in ?api_key= counts. It is removed from the query either way.",
    )

    @field_validator("prefixes", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("prefixes")
    @classmethod
    def _check_prefixes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for prefix in value:
            segments = prefix.split("/")
            plain = prefix.isascii() and not set(prefix) & set("%?#\\; ")
            if segments[0] or not all(segments[1:]) or not plain or {".", ".."} & set(segments):
                raise ValueError(f"{prefix!r} must look like /mlflow or /api/mlflow")
        return value


def load() -> Settings:
    """The settings in the environment; raises SettingsError, which names every wrong one."""
    problems = [_unknown(name) for name in sorted(os.environ) if name.startswith(PREFIX)]
    settings = None
    try:
        settings = Settings()
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=False, include_context=False):
            name = PREFIX + str(item["loc"][0]).upper()
            problems.append(f"{name}: {item['msg'].removeprefix('Value error, ')}")
    found = [problem for problem in problems if problem]
    if settings is None or found:
        raise SettingsError("; ".join(found))
    return settings


def _unknown(variable: str) -> str | None:
    name = variable.removeprefix(PREFIX).lower()
    if name in Settings.model_fields:
        return None
    close = difflib.get_close_matches(name, Settings.model_fields, n=1)
    hint = f"did you mean {PREFIX}{close[0].upper()}?" if close else "there is no such setting"
    return f"{variable}: {hint}"
