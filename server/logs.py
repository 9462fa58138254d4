"""Structured logs: one JSON object per line on standard error.

A line that belongs to a request carries its `request_id`. No header, key, token, signature or query string is ever
logged; as a second net, every line is searched for text of the shape of a key or a JWT, and all but the access line for that of a
password in a URL too, because an exception's message is not ours to choose.
"""

import logging
import re
import sys
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime

import msgspec

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_OWN_ATTRIBUTES = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message"}
# What may be long begins where nothing of its kind stands before it: tried from each of its characters on, a path of 64 KiB that is
# one word would stop the server for seconds.
_SECRETS = re.compile(
    r"(cof_[a-z2-7]{16}_)[A-Za-z0-9_-]+"
    r"""|((?<!\w)\w+://[^\s/:@"]*:)[^\s/@"\\]+(?=@)"""
    r"""|(\bbearer\s+)[^\s"\\]+"""
    r"|((?<![\w-])eyJ)[\w-]+\.[\w-]+\.[\w-]*",
    re.IGNORECASE,
)
_encoder = msgspec.json.Encoder(enc_hook=str)
_access_is_logged = False


class AccessLine(msgspec.Struct):
    """What is told of one request. `route` is a template; `path` is left out where no route matched, for it may hold anything.

    `principal` is by what the caller was recognised: `api_key` or `user_token`.
    """

    time: datetime
    level: str
    logger: str
    message: str
    request_id: str
    method: str
    route: str
    path: str | None
    status: int
    duration_ms: float
    bytes_in: int
    bytes_out: int
    principal: str | None
    user_id: str | None
    client: str | None


class JsonLines(logging.Formatter):
    """A record and its `extra` as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """One line whatever the message holds. What has the shape of a key or a password is blanked out, in the traceback too."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request := request_id.get():
            line["request_id"] = request
        line |= {name: value for name, value in record.__dict__.items() if name not in _OWN_ATTRIBUTES}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return without_secrets(encode(line))


def encode(line: object) -> str:
    """One line of JSON. A value that JSON has no form for is written as its `str`; a line with lone surrogates as escaped ASCII."""
    try:
        return _encoder.encode(line).decode()
    except (ValueError, TypeError, RecursionError):  # lone surrogates, keys that are not text
        return _encoder.encode({"message": ascii(line)}).decode()


def without_secrets(text: str) -> str:
    """The text with keys, bearer credentials, JWTs and passwords of URLs blanked out."""
    return _SECRETS.sub(lambda match: f"{match[match.lastindex or 0]}***", text)


def configure(level: str) -> None:
    """Sends every logger's lines of at least `level` to standard error. Called once by each process that serves or works."""
    global _access_is_logged  # noqa: PLW0603 - one process has one log
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # at info it logs whole URLs, queries included
    logging.getLogger("httpcore").setLevel(logging.WARNING)  # and this at debug the headers of answers, where a redirect's URL stands
    _access_is_logged = logging.getLogger("coffer.access").isEnabledFor(logging.INFO)


def access(line: AccessLine) -> None:
    """Writes the line of a finished request. Bypasses `logging`, which would cost more than the rest of the bookkeeping."""
    if _access_is_logged:
        text = encode(line)
        if "cof_" in text or "eyJ" in text:  # a key or a token where an id should be; to look closely at every line would cost too much
            text = without_secrets(text)
        with suppress(OSError, ValueError):  # a full disk or a closed pipe must not fail the request
            sys.stderr.write(f"{text}\n")
