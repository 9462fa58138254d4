"""How a command says that it failed: one table of exit codes, for scripts to rely on."""

from enum import IntEnum

from server import errors
from server.errors import CofferError


class Exit(IntEnum):
    """The exit codes of `coffer`. Anything that is not expected is `FAILURE`."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    UNAVAILABLE = 5
    FOUND = 6
    BUSY = 7
    INTERRUPTED = 130


MEANING: dict[Exit, str] = {
    Exit.OK: "done",
    Exit.FAILURE: "failed; also everything that has no code of its own",
    Exit.USAGE: "the command line, a setting or a value is wrong; nothing was done",
    Exit.NOT_FOUND: "there is no such file, user, key or volume",
    Exit.REFUSED: "refused: quota, conflict, missing rights, a type that is not stored",
    Exit.UNAVAILABLE: "the server, the database or the volume is not available; try again later",
    Exit.FOUND: "done, and found something that somebody must look at",
    Exit.BUSY: "the same tool is at work already, here or on another machine; nothing was done",
    Exit.INTERRUPTED: "interrupted with Ctrl-C",
}

_BY_ERROR: dict[type[CofferError], Exit] = {
    errors.InvalidRequest: Exit.USAGE,
    errors.NotFound: Exit.NOT_FOUND,
    errors.TokenKeysUnavailable: Exit.UNAVAILABLE,
    errors.RateLimited: Exit.UNAVAILABLE,
    errors.TooManyUploads: Exit.UNAVAILABLE,
    errors.VolumeFull: Exit.UNAVAILABLE,
    errors.VolumeUnavailable: Exit.UNAVAILABLE,
    errors.VolumeReadOnly: Exit.UNAVAILABLE,
    errors.UploadsStopped: Exit.UNAVAILABLE,
    errors.DatabaseUnavailable: Exit.UNAVAILABLE,
    errors.CommitUnknown: Exit.UNAVAILABLE,
    errors.IncompleteBody: Exit.FAILURE,
    errors.DigestMismatch: Exit.FAILURE,
    errors.Damaged: Exit.FAILURE,
    errors.InternalError: Exit.FAILURE,
}

_BY_STATUS = {400: Exit.USAGE, 404: Exit.NOT_FOUND, 500: Exit.FAILURE} | dict.fromkeys((429, 502, 503, 507), Exit.UNAVAILABLE)


class CommandFailed(Exception):
    """Ends a command with a sentence for the person who typed it, and an exit code for scripts."""

    def __init__(self, message: str, code: Exit = Exit.FAILURE) -> None:
        super().__init__(message)
        self.code = code


def code_of(error: CofferError) -> Exit:
    """The exit code of a domain error: `REFUSED`, unless the table above knows better."""
    return _BY_ERROR.get(type(error), Exit.REFUSED)


def code_of_status(status: int) -> Exit:
    """The exit code of an HTTP answer that tells of a failure."""
    return _BY_STATUS.get(status, Exit.REFUSED if 400 <= status < 500 else Exit.FAILURE)
