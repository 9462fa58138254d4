"""The composition root: makes every service once and hands it to those that need it."""

import logging
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.supervisors import Multiprocess

from server import logs, metrics, rates, supervision
from server.api import application
from server.api.front import Door, Front
from server.api.job_events import EVENTS_PATH, JobEventsDoor
from server.api.limits import Limits
from server.api.pace import PatientProtocol
from server.api.pipeline import WebhookDoor
from server.api.services import Services
from server.api.streams import Streams
from server.auth import Authenticator, TokenUsers, UserTokens
from server.delivery import AwaitedPreviews, Delivery, Links
from server.delivery.provenance import Provenance
from server.generation import Generation
from server.generation.service import WEBHOOK_PATH
from server.generation.sheets import Sheets
from server.intake import Housekeeping, Intake, ResumableUploads, Scanner
from server.ledger import Database, Notices, RememberedFigures
from server.rates import Buckets
from server.settings import SettingError, Settings, variable
from server.tus.door import TusDoor
from server.tus.protocol import PREFIX
from server.vault import Vault
from server.vault.cached import can_open_cached

# Above the 60 s for which nginx keeps an idle connection to us, so that it is never we who hang up on a request just sent.
_KEEP_ALIVE_SECONDS = 75
_BACKLOG = 4_096  # of connections, as in systemd/coffer-api.socket, whose word uvicorn would halve; the kernel's own limit may be lower
# For how long one of several processes may say nothing before another one is started in its place. On a machine that is very busy a process
# takes more than uvicorn's own 5 s to come as far as that: each was killed before, and the next one, and none ever served.
_SILENCE_SECONDS = 30

log = logging.getLogger("coffer")


def create_app() -> Front:
    """The ASGI application with settings from the environment. What a server process runs."""
    settings = Settings.load()
    logs.configure(settings.log_level)
    return assemble(settings)


def assemble(settings: Settings) -> Front:
    """The ASGI application with these settings. Opens nothing yet; start-up (ASGI lifespan) does.

    Raises `SettingError` without a key to sign links with: a server must not run on one that anybody could guess.
    """
    _check_link_keys(settings)
    db = Database(settings)
    vault = Vault(settings.volume_reserve_bytes)
    notices, streams = Notices(settings), Streams()
    figures = metrics.Metrics()
    scanner = Scanner(settings, figures) if settings.clamd else None
    intake, links = Intake(settings, db, vault, scanner), Links(settings.link_keys)
    services = Services(
        settings=settings,
        db=db,
        vault=vault,
        intake=intake,
        delivery=Delivery(
            db,
            vault,
            AwaitedPreviews(db, notices, settings.preview_wait_seconds, streams.stopping),
            settings.link_resource_policy,
            audit_reads=settings.audit_reads,
            edge_state=Path(settings.edge_state_file) if settings.edge_state_file else None,
        ),
        provenance=Provenance(db, vault, notices, settings.preview_wait_seconds, streams.stopping),
        links=links,
        generation=Generation(settings, db, intake, links),
        sheets=Sheets(db, notices, settings.preview_wait_seconds, streams.stopping),
        authenticator=Authenticator(
            db, settings.api_key_cache_seconds, tokens=UserTokens.from_settings(settings), token_users=TokenUsers(settings, db)
        ),
        limits=Limits(settings, Buckets()),
        notices=notices,
        figures=RememberedFigures(db),
        streams=streams,
        scanner=scanner,
        metrics=figures,
    )
    tus = TusDoor(services, ResumableUploads(services.intake, notices, streams.stopping))
    doors: dict[str, Door] = {PREFIX: tus, WEBHOOK_PATH: WebhookDoor(services), EVENTS_PATH: JobEventsDoor(services)}
    return Front(services, application.build(services), lambda: _running(services), doors)


def _check_link_keys(settings: Settings) -> None:
    if not settings.link_keys:
        raise SettingError(f"{variable('link_keys')} is not set: links are signed with it. Make one with: openssl rand -base64 32")


@asynccontextmanager
async def _running(services: Services) -> AsyncIterator[None]:
    """Everything started; on leaving, stopped in reverse. Starts with the database down too, and is ready once it is back."""
    housekeeping = Housekeeping(
        services.settings, services.db, services.vault, services.intake, also_watch=[services.delivery.refresh_link_epochs]
    )
    await services.db.open()
    try:
        await housekeeping.start()
        await services.authenticator.start()
        if services.scanner is not None:
            await services.scanner.warn_if_away()
        if not can_open_cached():
            log.warning("openat2(2) is refused, by an old kernel or systemd's RestrictSUIDSGID=: threads open files, which takes longer")
        log.info("started")
        async with supervision.supervised():
            yield
        await services.authenticator.stop()
        await housekeeping.stop()
    finally:
        if services.scanner is not None:
            services.scanner.close()
        await services.notices.close()
        services.vault.close()
        await services.db.close()
        log.info("stopped")


HTTP: dict[str, Any] = {
    "loop": "uvloop",
    "http": PatientProtocol,
    "ws": "none",
    "lifespan": "on",
    "log_config": None,
    "access_log": False,
    "server_header": False,
    "proxy_headers": False,  # server/api/proxies.py decides whom to believe; uvicorn would believe everybody on this machine
}
"""How uvicorn is to speak HTTP, wherever it serves the application."""


def _raise_file_limit() -> None:
    """An upload to disk takes two files, and the soft limit is 1,024 by custom (for select(2), which nothing here uses): 500 uploads."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT. The processes read their settings from the environment, as `create_app` does.

    Raises `SettingError` as `assemble`, before anything is opened.
    """
    _check_link_keys(settings)
    try:
        listener = supervision.inherited_listener()
    except ValueError as problem:
        raise SettingError(str(problem)) from None
    logs.configure(settings.log_level)
    UserTokens.from_settings(settings)  # a key file that is wrong is told here, and not by each process anew
    _raise_file_limit()
    with ExitStack() as sharing:
        if settings.processes > 1:
            sharing.enter_context(metrics.shared_by_processes())
            sharing.enter_context(rates.shared_by_processes())
        config = uvicorn.Config(
            "server.app:create_app",
            factory=True,
            host=settings.host,
            port=settings.port,
            backlog=_BACKLOG,
            workers=settings.processes,
            **HTTP,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=settings.stop_grace_seconds,
            timeout_worker_healthcheck=_SILENCE_SECONDS,
        )
        _run(config, listener)


def _run(config: uvicorn.Config, listener: socket.socket | None) -> None:
    """As `uvicorn.run`, but with a listener as what it is.

    uvicorn takes a descriptor (`fd`) for a Unix socket's, and then its connections, too: over TCP each would lack TCP_NODELAY, and
    the second packet of most answers wait for the client to acknowledge the first, for which a kernel takes 40 ms.
    """
    server = uvicorn.Server(config)
    with suppress(KeyboardInterrupt):
        if config.workers > 1:
            Multiprocess(config, sockets=[listener or config.bind_socket()]).run()
        else:
            server.run(sockets=[listener] if listener else None)
            if not server.started:
                raise SystemExit(1)
