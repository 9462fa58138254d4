"""Signed links as the JSON routes give them."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal
from uuid import UUID

import msgspec
from msgspec import Meta

from server import ledger
from server.api.services import Services
from server.delivery.headers import Disposition
from server.delivery.links import expiry
from server.errors import InvalidRequest
from server.ledger import File, PreviewRow
from server.previews.variants import Fit, Format, Variant, rounded
from server.settings import Settings

MOST_PIXELS = 65_535


class LinkAnswer(msgspec.Struct, omit_defaults=True):
    """Whoever has `url` may read the file until `expires_at`. Asked again within a window, it is the same.

    `preview` is the name of the preview that it leads to, where one was asked for: with the sizes and the quality that it really has.
    """

    url: str
    expires_at: datetime
    preview: str | None = None


class PreviewAnswer(msgspec.Struct, kw_only=True):
    """A preview of a file, with a signed link to it. Width and height are null for what is no picture."""

    url: str
    mime_type: str
    width: int | None
    height: int | None
    size_bytes: int


class VariantWish(msgspec.Struct, forbid_unknown_fields=True):
    """A picture within `width` and `height` pixels, made when the link is first used; at least one of both.

    It is never enlarged. `cover` fills the box and crops what stands over. `auto` takes the best format that the `Accept` of the request
    names. Sizes and quality are rounded up to the server's steps.
    """

    width: Annotated[int, Meta(ge=1, le=MOST_PIXELS)] | None = None
    height: Annotated[int, Meta(ge=1, le=MOST_PIXELS)] | None = None
    fit: Fit = "contain"
    format: Format | Literal["auto"] = "webp"
    quality: Annotated[int, Meta(ge=1, le=100)] = 80


PreviewWish = Annotated[str, Meta(max_length=32)] | VariantWish
"""The name of a preview that is made of every file (`320`, `storyboard`), or a picture made on demand."""


def signed_name(settings: Settings, wish: VariantWish) -> str:
    """What a link to such a picture signs. Raises `InvalidRequest` when neither width nor height is given."""
    if wish.width is None and wish.height is None:
        raise InvalidRequest("preview", "needs a width or a height")
    variant = Variant(
        width=None if wish.width is None else rounded(wish.width, settings.variant_sizes),
        height=None if wish.height is None else rounded(wish.height, settings.variant_sizes),
        fit="contain" if wish.width is None or wish.height is None else wish.fit,
        format="webp" if wish.format == "auto" else wish.format,
        quality=rounded(wish.quality, settings.variant_qualities),
    )
    return variant.name if wish.format != "auto" else f"{variant.name.removesuffix('.webp')}.auto"


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

    async def wished(self, user_id: str, files: Sequence[File], wish: PreviewWish) -> dict[UUID, str]:
        """The name of the preview of each file that there is or will be one of. Raises `InvalidRequest` as `signed_name`."""
        if isinstance(wish, VariantWish):
            name = signed_name(self._services.settings, wish)
            return {file.id: name for file in files if file.preview_state in {"pending", "ready"}}
        made = await ledger.get_previews_of_many(self._services.db, user_id, [file.id for file in files])
        return {file_id: each.file_name for file_id, rows in made.items() for each in rows if each.variant == wish}

    def previews(self, file: File, made: Iterable[PreviewRow]) -> dict[str, PreviewAnswer]:
        """Links to previews that were made of a file, by their names."""
        return {
            each.variant: PreviewAnswer(
                url=self.link(file, preview=each.file_name).url,
                mime_type=each.mime_type,
                width=each.width,
                height=each.height,
                size_bytes=each.size_bytes,
            )
            for each in made
        }

    def link(self, file: File, disposition: Disposition = "inline", name: str | None = None, preview: str | None = None) -> LinkAnswer:
        """A link to these bytes of a file or to a preview of them, below `COFFER_PUBLIC_URL`."""
        path = self._services.links.download(
            file, self._link_epoch, expires_at=self._expires_at, disposition=disposition, name=name, preview=preview
        )
        return LinkAnswer(self._services.settings.public_url + path, datetime.fromtimestamp(self._expires_at, UTC), preview)


def permitted_ttl(services: Services, ttl_seconds: int | None) -> int:
    """The life asked for, or the usual one. Raises `InvalidRequest` for a longer one than the settings allow."""
    most = services.settings.link_max_ttl_seconds
    if ttl_seconds is not None and ttl_seconds > most:
        raise InvalidRequest("ttl_seconds", f"must be at most {most}")
    return min(services.settings.link_ttl_seconds, most) if ttl_seconds is None else ttl_seconds
