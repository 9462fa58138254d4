"""Signed links as the JSON routes give them."""

from collections.abc import Iterable
from datetime import UTC, datetime

import msgspec

from server import ledger
from server.api.services import Services
from server.delivery.headers import Disposition
from server.delivery.links import expiry
from server.errors import InvalidRequest
from server.ledger import File


class LinkAnswer(msgspec.Struct):
    """Whoever has `url` may read the file until `expires_at`. Asked again within a window, it is the same."""

    url: str
    expires_at: datetime


class Linker:
    """Makes links to one user's files, all with the same end. Links carry the user's epoch, so the database is asked once for all."""

    def __init__(self, services: Services, link_epoch: int, expires_at: int) -> None:
        self._services = services
        self._link_epoch = link_epoch
        self._expires_at = expires_at

    @classmethod
    async def of(cls, services: Services, user_id: str, files: Iterable[File], ttl_seconds: int | None) -> "Linker":
        """To link these of the user's files. Raises `NotFound` for a user without files, and `InvalidRequest` as `permitted_ttl`."""
        expires_at = expiry(permitted_ttl(services, ttl_seconds), services.settings.link_window_seconds)
        link_epoch = (await ledger.get_user(services.db, user_id)).link_epoch
        if services.settings.audit_reads:
            await ledger.record_reads(services.db, "link.created", user_id, [file.id for file in files])
        return cls(services, link_epoch, expires_at)

    def link(self, file: File, disposition: Disposition = "inline", name: str | None = None) -> LinkAnswer:
        """A link to these bytes of a file, below `COFFER_PUBLIC_URL`."""
        path = self._services.links.download(file, self._link_epoch, expires_at=self._expires_at, disposition=disposition, name=name)
        return LinkAnswer(self._services.settings.public_url + path, datetime.fromtimestamp(self._expires_at, UTC))


def permitted_ttl(services: Services, ttl_seconds: int | None) -> int:
    """The life asked for, or the usual one. Raises `InvalidRequest` for a longer one than the settings allow."""
    most = services.settings.link_max_ttl_seconds
    if ttl_seconds is not None and ttl_seconds > most:
        raise InvalidRequest("ttl_seconds", f"must be at most {most}")
    return min(services.settings.link_ttl_seconds, most) if ttl_seconds is None else ttl_seconds
