"""What the worker does for linked assets: looks whether they are still there, and imports those that are wished for."""

import asyncio
import logging
from collections.abc import Coroutine
from uuid import UUID

import msgspec

from server import ledger
from server.actor import Actor, act_as
from server.assets.drive import is_page
from server.errors import (
    CofferError,
    FileTooLarge,
    Infected,
    InvalidRequest,
    KindRequired,
    NotFound,
    NotScannable,
    QuotaExceeded,
    TypeMismatch,
    UnsupportedType,
    UrlRefused,
    UserErasing,
)
from server.fetching import Answer, Fetcher, FetchFailed
from server.intake import Details, Intake, fetch_file
from server.ledger import Asset, Database, WorkCounts

CHECK_SECONDS = 30.0
"""How long an asset may take to show that it is there."""
_CHECKS_AT_ONCE = 16
_CHECK_LEASE_SECONDS = 2 * CHECK_SECONDS
_IMPORT_LEASE_SECONDS = 60.0
_RENEW_SECONDS = 15.0
_FIRST_AGAIN_SECONDS = 300.0
"""After a failure; each further one waits twice as long, up to the usual time."""
_PUT_OFF_SECONDS = 60.0

_FINAL = (
    UrlRefused,
    QuotaExceeded,
    FileTooLarge,
    UnsupportedType,
    TypeMismatch,
    KindRequired,
    Infected,
    NotScannable,
    InvalidRequest,
    NotFound,
    UserErasing,
)
"""What trying again would not mend, unless somebody changes something: they ask again then."""

log = logging.getLogger("coffer.assets")


class AssetWorker:
    """Lives in one event loop of a worker. Several workers may be at work."""

    def __init__(self, db: Database, fetcher: Fetcher, intake: Intake, counts: WorkCounts | None = None) -> None:
        self._db = db
        self._counts = counts or WorkCounts()
        self._fetcher = fetcher
        self._intake = intake
        self._settings = intake.settings
        self._checking: set[asyncio.Task[None]] = set()
        self._importing: dict[tuple[UUID, int], asyncio.Task[None]] = {}  # by id and version: a replaced asset's goes on beside the new one
        self._renew_at = 0.0

    async def look(self) -> None:
        """Begins what is due, as far as there is room, and keeps what is under way."""
        if room := _CHECKS_AT_ONCE - len(self._checking):
            for asset in await ledger.claim_asset_checks(self._db, room, _CHECK_LEASE_SECONDS):
                task = asyncio.create_task(self._guarded(self.check(asset)))
                self._checking.add(task)
                task.add_done_callback(self._checking.discard)
        if room := self._settings.fetches_at_once - len(self._importing):
            for asset in await ledger.claim_asset_imports(self._db, room, _IMPORT_LEASE_SECONDS):
                if (asset.id, asset.version) not in self._importing:
                    self._importing[asset.id, asset.version] = asyncio.create_task(self._guarded(self._import(asset)))
        now = asyncio.get_running_loop().time()
        if self._importing and now >= self._renew_at:
            await ledger.put_off_asset_imports(self._db, [asset_id for asset_id, _ in self._importing], _IMPORT_LEASE_SECONDS)
            self._renew_at = now + _RENEW_SECONDS

    async def stop(self) -> None:
        """Ends what is under way. Checks come back by themselves, and so do imports, at once."""
        importing = [asset_id for asset_id, _ in self._importing]
        for task in (*self._checking, *self._importing.values()):
            task.cancel()
        await asyncio.gather(*self._checking, *self._importing.values(), return_exceptions=True)
        if importing:
            await ledger.put_off_asset_imports(self._db, importing, 0)

    async def _guarded(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except CofferError as problem:  # of the database: it is due again when its lease is over
            log.warning("will be looked at again: %s", problem)
        except Exception:
            log.exception("will be looked at again")

    async def check(self, asset: Asset) -> None:
        """Looks at one asset and says what is found."""
        reason, mime_type, size_bytes = None, None, None
        try:
            async with (
                asyncio.timeout(CHECK_SECONDS),
                self._fetcher.request("GET", asset.fetch_url, headers={"range": "bytes=0-0"}) as answer,
            ):
                if answer.status not in (200, 206, 416):  # the last where it is empty
                    reason = f"status_{answer.status}"
                mime_type, size_bytes = _facts(answer)
        except TimeoutError:
            reason = "timeout"
        except FetchFailed as problem:
            reason = problem.reason
        except UrlRefused:
            reason = "refused"
        if reason is None and is_page(asset.fetch_url, mime_type):
            reason = "not_shared"
        usual_seconds = float(self._settings.asset_check_seconds)
        sooner_seconds = min(_FIRST_AGAIN_SECONDS * 2.0 ** min(asset.failures, 20), usual_seconds)
        await ledger.finish_asset_check(
            self._db,
            asset,
            reason=reason,
            mime_type=mime_type,
            size_bytes=size_bytes,
            again_seconds=usual_seconds if reason is None else sooner_seconds,
        )
        self._counts.count("asset_check", "reachable" if reason is None else "unreachable")

    async def _import(self, asset: Asset) -> None:
        try:
            if asset.import_actor is not None:
                act_as(msgspec.json.decode(asset.import_actor, type=Actor))
            await self._import_as_asked(asset)
        finally:
            del self._importing[asset.id, asset.version]

    async def _import_as_asked(self, asset: Asset) -> None:
        try:
            file = await fetch_file(
                self._intake,
                self._fetcher,
                asset.user_id,
                asset.fetch_url,
                details=msgspec.json.decode(asset.details, type=Details),
                idempotency_key=f"asset:{asset.id}:{asset.version}",
                kinds=None if asset.import_kinds is None else frozenset(asset.import_kinds),
            )
        except FetchFailed as problem:
            await self._fail_import(asset, problem.reason)
        except _FINAL as problem:
            await self._fail_import(asset, problem.code)
        except CofferError as problem:
            log.warning("an import waits: %s", problem, extra={"asset_id": str(asset.id)})
            await ledger.put_off_asset_imports(self._db, [asset.id], _PUT_OFF_SECONDS)
        else:
            await ledger.finish_asset_import(self._db, asset, file_id=file.id, reason=None)
            self._counts.count("asset_import", "stored")

    async def _fail_import(self, asset: Asset, reason: str) -> None:
        await ledger.finish_asset_import(self._db, asset, file_id=None, reason=reason)
        self._counts.count("asset_import", "failed")


def _facts(answer: Answer) -> tuple[str | None, int | None]:
    """Type and length as the server tells them: of the whole where it answers with a part."""
    mime_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()[:127] or None
    length = answer.headers.get("content-length") if answer.status == 200 else answer.headers.get("content-range", "").rpartition("/")[2]
    return mime_type, int(length) if length and length.isascii() and length.isdigit() and len(length) < 19 else None
