"""Builds the authorities from the settings."""

from __future__ import annotations

import secrets
from collections.abc import Callable

from mlflow_hokusai_auth.authorities import Authority, Backend, server_jobs
from mlflow_hokusai_auth.authorities.browser_session import SessionAuthority
from mlflow_hokusai_auth.authorities.cache import CachedBackend
from mlflow_hokusai_auth.authorities.chain import Chain
from mlflow_hokusai_auth.authorities.redis_identities import SharedCache
from mlflow_hokusai_auth.authorities.service import AuthService
from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.sessions import Sessions

from .gate import lookup_pool
from .settings import Settings


def assemble(settings: Settings, store: LocalStore, sessions: Sessions) -> Authority:
    """Return the gate's authority: sessions, then the jobs' secret, then the authorities of `build`.

    It removes the jobs' secret from the environment, so each worker calls it once.
    """
    return SessionAuthority(server_jobs.with_jobs(build(settings, store)), sessions)


def build(settings: Settings, store: LocalStore) -> Authority:
    """Return the authorities of `settings.backend`, each with its cache, in that order."""
    # Without Redis, processes share no entries, and each may have its own secret.
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
    """Return a function that looks up a new random key in every authority of `settings.backend`.

    Any answer shows that the authority works. The function raises the authority's error.
    """
    backends = [_backend(name, settings, store) for name in settings.backend]

    def look_up() -> str:
        for backend in backends:
            backend.lookup(keys.generate("test"), "")
        return f"{', '.join(settings.backend)} answers"

    return look_up


def _backend(name: str, settings: Settings, store: LocalStore) -> Backend:
    if name == "local":
        return store
    return AuthService(
        settings.service_url,
        service_id=settings.service_id,
        timeout=settings.service_timeout,
        ca_bundle=settings.service_ca_bundle or None,
        # One connection for each thread of the lookup pool.
        connections=2 * lookup_pool.THREADS,
        use_environment_proxies=settings.service_environment_proxies,
    )
