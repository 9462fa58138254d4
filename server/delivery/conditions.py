"""Conditional requests (RFC 9110, section 13). Our ETags are strong, the same ETag means the same bytes, but for those of previews.

Values come as one text each, repeated header lines joined by `, ` in their order.
"""

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from enum import Enum

from server.errors import PreconditionFailed

_ENTITY_TAG = re.compile(r'[ \t,]*(W/)?("[\x21\x23-\x7e\x80-\xff]*")[ \t]*(?=,|\Z)')
_DATE_FORMATS = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y")


class Outcome(Enum):
    """What conditions that hold lead to: an answer with the bytes, or a 304. Those that fail raise `PreconditionFailed`."""

    PROCEED = "proceed"
    NOT_MODIFIED = "not modified"


def evaluate(method: str, headers: Mapping[str, str], tag: str, changed_at: datetime) -> Outcome:
    """Whether a request for bytes with this ETag, last changed then, is to be answered with them.

    `headers` has lower-case names. The order is that of section 13.2.2. Raises `PreconditionFailed`: for `If-Match` and
    `If-Unmodified-Since`, and for `If-None-Match` on methods other than GET and HEAD.
    """
    changed_at = changed_at.replace(microsecond=0)  # what Last-Modified can say
    if (value := headers.get("if-match")) is not None:
        if not evaluate_if_match(value, tag):
            raise PreconditionFailed
    elif (value := headers.get("if-unmodified-since")) is not None:
        since = http_date(value)
        if since is not None and changed_at > since:
            raise PreconditionFailed

    reading = method in {"GET", "HEAD"}
    if (value := headers.get("if-none-match")) is not None:
        if _names(value, tag, weakly=True):
            if not reading:
                raise PreconditionFailed
            return Outcome.NOT_MODIFIED
    elif reading and (value := headers.get("if-modified-since")) is not None:
        since = http_date(value)
        if since is not None and changed_at <= since:
            return Outcome.NOT_MODIFIED
    return Outcome.PROCEED


def evaluate_if_match(value: str, tag: str) -> bool:
    """Whether `If-Match` holds for existing bytes with this ETag. Weak ETags never match, malformed ones neither."""
    return _names(value, tag, weakly=False)


def range_applies(if_range: str | None, tag: str, changed_at: datetime, *, date_is_strong: bool) -> bool:
    """Whether a Range header counts: always without `If-Range`, else only when the client's part is of these very bytes.

    A date proves that only where the bytes cannot have changed twice within its second (`date_is_strong`, section 8.8.2.2);
    parts of two versions would be joined otherwise. When in doubt the whole file is sent, which is always right.
    """
    if if_range is None:
        return True
    if if_range.lstrip(" \t").startswith(('"', "W/")):
        return if_range.strip(" \t") == tag and not tag.startswith("W/")
    return date_is_strong and http_date(if_range) == changed_at.replace(microsecond=0)


def http_date(value: str) -> datetime | None:
    """An HTTP-date in any of its three forms (section 5.6.7), or None for anything else."""
    for form in _DATE_FORMATS:
        try:
            return datetime.strptime(value.strip(" \t"), form).replace(tzinfo=UTC)
        except ValueError:
            continue
    return None


def _names(value: str, tag: str, *, weakly: bool) -> bool:
    """Whether a list of entity tags, or `*`, names the bytes that have this one."""
    if value.strip(" \t") == "*":
        return True
    ours, is_weak = tag.removeprefix("W/"), tag.startswith("W/")
    return any(each == ours and (weakly or not (weak or is_weak)) for weak, each in _entity_tags(value))


def _entity_tags(value: str) -> Iterator[tuple[bool, str]]:
    """Each entity tag and whether it is weak, up to the first malformed one."""
    at = 0
    while match := _ENTITY_TAG.match(value, at):
        yield match[1] is not None, match[2]
        at = match.end()
