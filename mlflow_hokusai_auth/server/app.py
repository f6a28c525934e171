"""The composition root: `mlflow server --app-name hokusai-auth` calls `create_app`.

MLflow imports this module twice: in the `mlflow server` command itself, to see whether `create_app` is
a factory, and in each worker. The first import, before any worker runs, checks the settings and
migrates the store, so that a mistake stops the command with one message, not its workers in a loop.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

try:
    import pydantic_settings  # noqa: F401
    import sqlalchemy  # noqa: F401
except ImportError as error:
    raise SystemExit(
        f"The hokusai-auth server needs {error.name}. On the machine that runs the tracking server, "
        "install the extra: pip install 'mlflow-hokusai-auth[server]'"
    ) from None

from mlflow_hokusai_auth.authorities import server_jobs
from mlflow_hokusai_auth.authorities.identity_tokens import Verifier
from mlflow_hokusai_auth.core.addresses import networks
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable, SettingsError, StoreError
from mlflow_hokusai_auth.core.prefixes import Prefixes
from mlflow_hokusai_auth.store.dry_run import Observed
from mlflow_hokusai_auth.store.hourly import Hourly
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.links import Links
from mlflow_hokusai_auth.store.notices import announce
from mlflow_hokusai_auth.store.sessions import Sessions
from mlflow_hokusai_auth.store.sweep import sweep
from mlflow_hokusai_auth.store.trusts import Trusts
from mlflow_hokusai_auth.store.usage import UseCounter

from . import (
    authorities,
    caller,
    live_settings,
    metrics,
    settings,
)
from .gate import cors, interceptors
from .gate.gate import Gate
from .gate.limits import Limits
from .gate.lookup_pool import LookupPool
from .isolation import hidden, locations, outside, preparation, provenance, reads, writes
from .isolation.artifacts import Artifacts
from .isolation.facts import Facts
from .observe import redaction
from .observe.decision_log import DecisionLog
from .upstream import (
    apps,
    artifact_roots,
    database_errors,
    fast_path,
    pragmas,
    repositories,
    sockets,
    static_files,
    stores,
    trailers,
)
from .upstream.experiment_folders import ExperimentFolders
from .web import (
    account,
    api,
    audit_api,
    health,
    keys_api,
    leak_reports,
    links_api,
    monitoring,
    ownership_api,
    pages,
    status_api,
    token_api,
    trust_api,
    validate_key,
)

if TYPE_CHECKING:
    import flask
    from _typeshed.wsgi import WSGIApplication
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    from mlflow_hokusai_auth.core.locations import Roots

    from .gate.asgi import AsgiGate

#: uvicorn's STARTUP_FAILURE: its supervisor stops instead of restarting the worker.
_STARTUP_FAILURE = 3

#: The errors for a wrong setting or an unready store; their texts say what to do.
_MISTAKES = (
    SettingsError,
    StoreError,
    AuthorityUnavailable,
    ValueError,
    ModuleNotFoundError,
)


def create_app() -> AsgiGate | WSGIApplication:
    """Return MLflow's server behind the gate: an ASGI application under uvicorn, otherwise a WSGI one.

    Exits the process, with a message, if the settings are wrong or the store is not ready.
    """
    try:
        config = settings.load()
        _refuse_static_prefix(os.environ.get("_MLFLOW_STATIC_PREFIX"))
        store = LocalStore(config.database_uri.get_secret_value())
        if config.force_mode != "off" and not store.is_current():
            raise StoreError(
                "the key store's tables are missing or have another version. Start the server with "
                "`mlflow server --app-name hokusai-auth`, which migrates them."
            )
        return _assemble(config, store)
    except _MISTAKES as error:
        print(f"hokusai-auth can't start: {error}", file=sys.stderr, flush=True)
    except Exception:
        # If a TypeError reached uvicorn under MLflow before 3.9, uvicorn would conclude that this is no
        # factory, and serve this function as the application.
        traceback.print_exc()
    sys.exit(_STARTUP_FAILURE)


def _assemble(config: settings.Settings, store: LocalStore) -> AsgiGate | WSGIApplication:
    flask_app = apps.flask_app()
    sessions = Sessions(store.database)
    mode = live_settings.Mode(config.mode, config.force_mode)
    isolation = live_settings.Isolation(mode, config.isolation)
    leak_keys = leak_reports.load(config.leak_public_keys) if config.leak_public_keys else {}
    observed, uses = Observed(store.database), UseCounter(store.database)
    roots = artifact_roots.load(config.artifact_roots)
    folders = ExperimentFolders(roots)
    log = DecisionLog(
        sample=config.log_reads,
        observed=observed.add,
        folders=folders,
        debug_headers=config.debug_headers,
    )
    gate = Gate(
        authority=authorities.assemble(config, store, sessions),
        policy=settings.policy_of(config, static_files.public_paths()),
        prefixes=Prefixes(config.prefixes),
        cors=cors.of_mlflow(),
        limits=Limits(
            config.redis_url.get_secret_value(), failures_per_minute=config.failures_per_minute
        ),
        observer=log,
        interceptors=interceptors.load(refuse_on_error=config.interceptor_errors == "refuse"),
        header_policy=settings.header_policy_of(config),
        count=uses.add,
        absent={
            **({} if leak_keys else {leak_reports.RULE: leak_reports.ABSENT}),
            **({} if _has_store(config) else {token_api.RULE: trust_api.ABSENT}),
        },
        contact=config.contact,
        trusted=networks(config.trusted_proxies),
        mode=mode,
        isolation=isolation,
        # The time for the auth service, and 5 s for everything else that a lookup waits for.
        lookups=LookupPool(timeout=config.service_timeout + 5.0),
        folders=folders,
    )
    for blueprint in _blueprints(config, store, sessions, gate, leak_keys, log):
        blueprint.before_request(caller.refuse_without_key)
        flask_app.register_blueprint(blueprint)
    caller.install(flask_app)
    static_files.install(flask_app)
    prepared = _confine(config, gate, roots, observed, flask_app)
    stores.open_by_itself()
    database_errors.shorten()
    pragmas.set_once()
    folders.begin()
    metrics.describe(config.policy, ",".join(config.backend))
    redaction.cut_keys()
    redaction.show_own()

    hourly = (
        Hourly(
            partial(announce, store.database),
            "Keys that end soon, or that are unused, can't be announced",
        ),
        Hourly(partial(sweep, store.database), "What is over can't be deleted"),
    )

    def look_again() -> None:
        prepared.look_again()
        for work in hourly:
            work.look()

    def begin() -> None:
        live_settings.follow(store.database, mode, isolation, look_again)
        prepared.report()
        outside.log_in_thread(roots, config.artifact_roots)

    app: AsgiGate | WSGIApplication
    if os.environ.get("_MLFLOW_SGI_NAME") == "uvicorn":
        from .gate.asgi import AsgiGate
        from .upstream import late_bodies

        trailers.check()
        late_bodies.end_quietly()
        whole = apps.fastapi_app(flask_app)
        short = fast_path.build(whole, flask_app) if config.shortcut else None
        ends = (log.flush, uses.write, observed.write, sessions.write)
        app = AsgiGate(whole, gate, short, ends)
        # uvicorn calls this function in the process that serves.
        begin()
    else:
        from .gate.wsgi import wsgi_gate

        app = wsgi_gate(flask_app, gate, begin)
    sockets.send_at_once()
    # All objects of this moment live as long as the process, and a full collection that visits them
    # stops every request: with them frozen, p99 of experiments/get fell from 200 to 60 ms.
    gc.collect()
    gc.freeze()
    return app


def _has_store(config: settings.Settings) -> bool:
    return "local" in config.backend


def _blueprints(
    config: settings.Settings,
    store: LocalStore,
    sessions: Sessions,
    gate: Gate,
    leak_keys: Mapping[str, EllipticCurvePublicKey],
    log: DecisionLog,
) -> Sequence[flask.Blueprint]:
    """Return our own routes, beside MLflow's."""
    lifetimes, has_store = settings.lifetimes_of(config), _has_store(config)
    isolation, urls = gate.isolation, config.public_urls
    trusts = Trusts(store.database, lifetimes=lifetimes)
    healthy = health.Health(health.checks(store, authorities.probe(config, store), isolation))
    return (
        keys_api.blueprint(store, gate, leak_keys, lambda: isolation.now == "enforce", lifetimes),
        ownership_api.blueprint(store, gate),
        audit_api.blueprint(store.database),
        api.unknown_paths(),
        validate_key.blueprint(),
        trust_api.blueprint(trust_api.TrustActions(store, gate, has_store, lifetimes)),
        links_api.blueprint(
            links_api.LinkMaker(Links(store.database), urls, lifetimes), has_store=has_store
        ),
        token_api.blueprint(trusts, gate, Verifier(urls) if urls else None),
        pages.blueprint(
            store,
            sessions,
            gate,
            config.session_lifetime,
            lifetimes,
            has_store=has_store,
            public_urls=urls,
        ),
        account.blueprint(gate, sessions),
        monitoring.blueprint(store, log.flush),
        health.blueprint(healthy),
        status_api.blueprint(store, gate.mode, isolation, healthy),
    )


def _confine(
    config: settings.Settings, gate: Gate, roots: Roots, observed: Observed, app: flask.Flask
) -> preparation.Preparation:
    """Keep suppliers apart in MLflow's data, and artifacts in `roots`, from now on."""
    policy, folders, isolation = gate.policy, gate.folders, gate.isolation
    watch = artifact_roots.Watch(gate.mode, observed.add, config.contact)
    isolated = artifact_roots.Watch(isolation, observed.add, config.contact)
    facts = Facts(usable=False)
    prepared = preparation.Preparation(isolation, facts)
    artifacts = Artifacts(roots, policy, folders, isolated, facts)
    repositories.confine(roots, watch, artifacts)
    locations.Stored(roots, policy, watch, folders, artifacts).install()
    provenance.Provenance(watch, config.provenance, policy).install()
    writes.Writes(policy, isolated, facts, frozenset(config.protected_aliases)).install()
    reads.Reads(policy, isolated, facts).install()
    hidden.Hidden(isolated).install(app)
    return prepared


def _refuse_static_prefix(static_prefix: str | None) -> None:
    if static_prefix:
        raise SettingsError(
            "--static-prefix is not supported: MLflow serves some of its routes outside it. Remove the "
            f"option and set HOKUSAI_AUTH_PREFIXES={static_prefix}; the whole server answers there."
        )


def bootstrap(options: dict[str, Any]) -> None:
    """Check the options of `mlflow server` and the settings, and migrate the store.

    It runs before any worker starts. `options` are the command's parameters, by click's names. Raises
    SystemExit with a message.
    """
    try:
        config = settings.load()
        _refuse_static_prefix(options.get("static_prefix"))
        if "--root-path" in (options.get("uvicorn_opts") or "") or os.environ.get(
            "UVICORN_ROOT_PATH"
        ):
            raise SettingsError(
                "--root-path is not supported: with it, MLflow's middlewares and its router read the "
                "same path differently. Remove it and add the path to HOKUSAI_AUTH_PREFIXES."
            )
        if "uvicorn" in (options.get("gunicorn_opts") or "").lower():
            raise SettingsError(
                "gunicorn with uvicorn's worker class is not supported: MLflow then reports WSGI to "
                "the app. Remove --gunicorn-opts; uvicorn is MLflow's default."
            )
        # By default uvicorn trusts X-Forwarded-For from every process on this machine.
        os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
        trailers.prepare()
        store = LocalStore(config.database_uri.get_secret_value())
        try:
            store.migrate()
        except (AuthorityUnavailable, StoreError) as error:
            if config.force_mode != "off":
                raise
            print(
                f"hokusai-auth: starts all the same, as its mode is off: {error}", file=sys.stderr
            )
        authorities.build(config, store)
        interceptors.load(refuse_on_error=False)
        if config.leak_public_keys:
            leak_reports.load(config.leak_public_keys)
        server_jobs.issue()
        metrics.prepare()
        atexit.register(metrics.clear)
        if config.metrics_bind:
            metrics.serve(config.metrics_bind, store)
        _warn(config, store)
    except _MISTAKES as error:
        raise SystemExit(f"hokusai-auth can't start: {error}") from None


def _warn(config: settings.Settings, store: LocalStore) -> None:
    """Print, at each start, the warnings that an operator must not overlook."""
    mode = live_settings.Mode(config.mode, config.force_mode)
    if not config.force_mode:
        mode.follow(store.database.states())
    if mode.now == "off":
        print("hokusai-auth: MODE IS off. NO REQUEST NEEDS A KEY.", file=sys.stderr)
    elif mode.now == "observe":
        print(
            "hokusai-auth: mode is observe. Requests that would be refused are only logged.",
            file=sys.stderr,
        )
    if not config.force_mode and mode.now != config.mode:
        print(
            f"hokusai-auth: mode is {mode.now}, set by `hokusai-auth mode`. It overrides "
            f"HOKUSAI_AUTH_MODE={config.mode}.",
            file=sys.stderr,
        )
    if warning := static_files.may_be_written():
        print(f"hokusai-auth: {warning}", file=sys.stderr)
    if "service" in config.backend and config.service_url.startswith("http://"):
        print(
            f"hokusai-auth: keys are sent to {config.service_url} without encryption.",
            file=sys.stderr,
        )


def _in_server_command() -> dict[str, Any] | None:
    context = click.get_current_context(silent=True)
    return context.params if context is not None and context.info_name == "server" else None


if (_options := _in_server_command()) is not None:
    bootstrap(_options)
