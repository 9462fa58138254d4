"""A user's files over HTTP: these commands run anywhere and need only a URL and an API key."""

import hashlib
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import httpx
import msgspec
from tqdm import tqdm

from server.commands.failures import CommandFailed, Exit, code_of_status
from server.commands.output import human_bytes, printable, say

_CHUNK_BYTES = 2**20
_DELETED_AT_ONCE = 1000
# Storing and syncing gigabytes may keep the server silent for a while; everything else answers sooner.
_TIMEOUT = httpx.Timeout(30, read=600, write=600)


@dataclass(frozen=True, slots=True)
class Server:
    """Where a Coffer server is, and for whom to ask. `api_key` is never shown."""

    url: str
    api_key: str
    user_id: str

    def client(self) -> httpx.Client:
        """Sends the key and the user with every request; connects with the first one. To be closed by the caller."""
        # The user id may be any Unicode; HTTP headers are bytes, and the server reads these as UTF-8.
        headers = {b"Authorization": f"Bearer {self.api_key}".encode(), b"X-User-Id": self.user_id.encode()}
        return httpx.Client(base_url=self.url, headers=httpx.Headers(headers), timeout=_TIMEOUT)


def upload(server: Server, *, paths: list[Path], fields: dict[str, str], as_json: bool) -> None:
    """`coffer upload`. One file's failure does not keep the others back; the first one's code is the command's.

    The answer's SHA-256 is compared with that of the bytes read here, so a success means that these bytes are stored.
    """
    failed: CommandFailed | None = None
    with server.client() as client:
        for path in paths:
            try:
                stored = _upload_one(client, path, fields)
            except CommandFailed as problem:
                say(f"{path}: {problem}")
                failed = failed or problem
            except OSError as problem:
                say(f"{path}: {problem.strerror}")
                failed = failed or CommandFailed("", Exit.NOT_FOUND if isinstance(problem, FileNotFoundError) else Exit.FAILURE)
            else:
                print(msgspec.json.encode(stored).decode() if as_json else f"{stored['id']}  {printable(stored['file_name'])}", flush=True)
    if failed:
        raise CommandFailed("not every file was uploaded", failed.code)


def _upload_one(client: httpx.Client, path: Path, fields: dict[str, str]) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file, _progress(path.name, size_bytes := os.fstat(file.fileno()).st_size) as progress:

        def body() -> Iterator[bytes]:
            left = size_bytes
            while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
                left -= len(chunk)
                digest.update(chunk)
                yield chunk
                progress.update(len(chunk))

        # The length is declared, so the server refuses at once what does not fit.
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size_bytes)}
        response = _request(client, "POST", "/api/files/upload", params={"name": path.name} | fields, content=body(), headers=headers)
    stored: dict[str, Any] = response.json()
    if stored["sha256"] != digest.hexdigest():
        raise CommandFailed(f"the server stored other bytes than were read here, as file {stored['id']}")
    return stored


def show_all(server: Server, *, query: dict[str, str], most: int | None, as_json: bool) -> None:
    """`coffer ls`: follows the pages to their end, or to `most` files."""
    shown = 0
    query = dict(query)
    with server.client() as client:
        while most is None or shown < most:
            page = _request(client, "GET", "/api/files", params=query).json()
            files = page["files"] if most is None else page["files"][: most - shown]
            shown += len(files)
            for each in files:
                print(msgspec.json.encode(each).decode() if as_json else _line(each))
            if not page["next_cursor"]:
                return
            query["cursor"] = page["next_cursor"]


def _line(file: dict[str, Any]) -> str:
    size, uploaded = human_bytes(file["file_size"]), file["upload_date"][:19]
    return f"{file['id']}  {file['file_type']:7}  {size:>10}  {uploaded}  {printable(file['file_name'])}"


def get(server: Server, *, file_id: str, to: str | None, force: bool) -> None:
    """`coffer get`: the file appears under its name once it is whole and its SHA-256 is right. `-` is standard output."""
    with server.client() as client:
        about = _request(client, "GET", f"/api/files/{file_id}").json()
        if to == "-":
            _download(client, about, sys.stdout.buffer)
            return
        name: str = about["file_name"]
        if to is None and (Path(name).name != name or name.startswith(".")):
            raise CommandFailed(f"the file's name {name!r} is not one to write to; say where with -o", Exit.REFUSED)
        target = Path(to or name)
        if target.exists() and not force:
            raise CommandFailed(f"{target} exists; --force replaces it", Exit.REFUSED)
        draft = target.with_name(f".coffer-{secrets.token_hex(8)}")
        try:
            with draft.open("xb") as file:
                _download(client, about, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    say(f"wrote {target} ({human_bytes(about['file_size'])})")


def _download(client: httpx.Client, about: dict[str, Any], file: BinaryIO) -> None:
    digest = hashlib.sha256()
    try:
        with (
            client.stream("GET", f"/api/files/{about['id']}/download") as response,
            _progress(about["file_name"], about["file_size"]) as progress,
        ):
            if response.is_error:
                response.read()
                _check(response)
            for chunk in response.iter_raw(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
                progress.update(len(chunk))
    except httpx.HTTPError as problem:
        raise _unreachable(client, problem) from problem
    if digest.hexdigest() != about["sha256"]:
        raise CommandFailed("what arrived does not have the file's SHA-256; try again")


def remove(server: Server, *, ids: list[str], permanently: bool, for_real: bool) -> None:
    """`coffer rm`: to the trash where the server has one, unless `permanently`.

    Prints the ids that were deleted; those that do not exist are told, and make the code `NOT_FOUND`.
    """
    missing = 0
    with server.client() as client:
        if not for_real:
            for file_id in ids:
                about = _request(client, "GET", f"/api/files/{file_id}").json()
                print(f"{about['id']}  {human_bytes(about['file_size'])}  {printable(about['file_name'])}")
            say(f"would delete {len(ids)} files. Nothing was changed; repeat with --for-real")
            return
        for start in range(0, len(ids), _DELETED_AT_ONCE):
            wish = {"ids": ids[start : start + _DELETED_AT_ONCE], "permanent": permanently}
            answer = _request(client, "POST", "/api/files/delete", json=wish).json()
            for result in answer["results"]:
                if result["status"] == "deleted":
                    print(result["id"])
                else:
                    missing += 1
                    say(f"there is no file {result['id']}")
    if missing:
        raise CommandFailed(f"{missing} of {len(ids)} files did not exist", Exit.NOT_FOUND)


def _progress(name: str, size_bytes: int) -> "tqdm[NoReturn]":
    """A bar on standard error; none where that is no terminal."""
    return tqdm(desc=printable(name), total=size_bytes, unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False)


def _request(client: httpx.Client, method: str, path: str, **options: Any) -> httpx.Response:
    try:
        response = client.request(method, path, **options)
    except httpx.HTTPError as problem:
        raise _unreachable(client, problem) from problem
    _check(response)
    return response


def _check(response: httpx.Response) -> None:
    """Raises the server's own words for a failure."""
    if response.is_success:
        return
    try:
        problem = response.json()
        told = {name: value for name, value in problem.items() if name not in {"type", "title", "status", "detail", "request_id"}}
        message = f"{problem['detail']} ({', '.join(f'{name}: {value}' for name, value in told.items())}; request {problem['request_id']})"
    except (ValueError, KeyError, AttributeError):
        message = f"the server answered {response.status_code}"
    raise CommandFailed(message, code_of_status(response.status_code))


def _unreachable(client: httpx.Client, problem: httpx.HTTPError) -> CommandFailed:
    return CommandFailed(f"{client.base_url}: {str(problem) or type(problem).__name__}", Exit.UNAVAILABLE)
