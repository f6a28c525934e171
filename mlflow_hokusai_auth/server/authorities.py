"""Whom the gate asks about a key, put together from the settings."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from mlflow_hokusai_auth.authorities import Authority, Backend
from mlflow_hokusai_auth.authorities.cache import CachedBackend
from mlflow_hokusai_auth.authorities.chain import Chain
from mlflow_hokusai_auth.authorities.redis_identities import SharedCache
from mlflow_hokusai_auth.authorities.service import AuthService
from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.store.keys import LocalStore

from .gate import lookup_pool
from .settings import Settings


def build(settings: Settings, store: LocalStore) -> Authority:
    """The authorities of `settings.backend`, each behind its cache, in that order."""
    # Where nothing is shared between processes, each may have a secret of its own.
    secret = settings.secret_key.get_secret_value().encode() or secrets.token_bytes(32)
    redis_url = settings.redis_url.get_secret_value()
    cached = [
        CachedBackend(
            backend,
            ttl=settings.cache_ttl,
            timeout=settings.service_timeout,
            negative_ttl=settings.negative_cache_ttl,
            stale_if_error=settings.stale_if_error,
            secret=secret,
            shared=SharedCache(redis_url, max_age=settings.cache_ttl)
            if redis_url and backend is not store
            else None,
            namespace=f"{settings.service_url} {settings.service_id}",
        )
        for backend in [_backend(name, settings, store) for name in settings.backend]
    ]
    return cached[0] if len(cached) == 1 else Chain(cached)


def probe(settings: Settings, store: LocalStore) -> Callable[[], str]:
    """What asks every authority of `settings.backend` about a key that nobody has.

    Any verdict on it shows that the authority works. Raises what the authority does.
    """
    backends = [_backend(name, settings, store) for name in settings.backend]

    def ask() -> str:
        for backend in backends:
            backend.lookup(keys.generate("test"), "")
        return f"{', '.join(settings.backend)} answers"

    return ask


def _backend(name: str, settings: Settings, store: LocalStore) -> Backend:
    if name == "local":
        return store
    return AuthService(
        settings.service_url,
        service_id=settings.service_id,
        timeout=settings.service_timeout,
        ca_bundle=settings.service_ca_bundle or None,
        # One for each thread that may ask.
        connections=2 * lookup_pool.THREADS,
        use_environment_proxies=settings.service_environment_proxies,
    )
