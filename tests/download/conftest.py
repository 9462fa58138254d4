"""A real volume with a real file, and a row that a test can change while a request is on its way."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import msgspec
import pytest

from server import ledger
from server.api.limits import Limits
from server.api.services import Services
from server.auth import Principal, Scope
from server.auth.authenticator import Recognised
from server.delivery import Delivery
from server.errors import NotFound, Unauthenticated
from server.ledger.models import File, VolumeRow
from server.rates import Buckets
from server.settings import Settings
from server.vault import Vault
from server.vault.sentinel import init_volume
from tests.download.samples import OWNER, a_file


class Shelf:
    """Stands in for the ledger: the rows, and what happens just after the n-th look at one."""

    def __init__(self, mount: Path, volume_id: UUID) -> None:
        self.mount = mount
        self.volume_id = volume_id
        self.rows: dict[UUID, File] = {}
        self.looks = 0
        self.after_look: dict[int, Callable[[], object]] = {}

    def put(self, data: bytes, **changes: Any) -> File:
        """Stores bytes and their row."""
        file = a_file(data, volume_id=self.volume_id, **changes)
        path = self.path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.rows[file.id] = file
        return file

    def put_row(self, file: File, **changes: Any) -> File:
        """Changes the row alone."""
        self.rows[file.id] = msgspec.structs.replace(file, **changes)
        return self.rows[file.id]

    def path(self, file: File) -> Path:
        return self.mount / file.file_path

    async def get_file(self, user_id: str, file_id: UUID) -> File:
        self.looks += 1
        row = self.rows.get(file_id)
        self.after_look.get(self.looks, lambda: None)()
        if row is None or row.user_id != user_id:
            raise NotFound
        return row


class FakeAuthenticator:
    """Lets in whoever presents `Bearer good`."""

    async def principal(
        self, authorization: str | None, acting_user: str | None, needed: Scope, client: str | None, recognised: Recognised
    ) -> Principal:
        assert client is None
        assert needed is Scope.FILES_READ
        if authorization != "Bearer good":
            raise Unauthenticated
        return Principal(user_id=acting_user, key_id="k", scopes=frozenset({"files:read"}))

    async def admit_user(self, principal: Principal) -> None:
        assert principal.key_id == "k"  # whose user need not have a row


@pytest.fixture
def vault() -> Iterator[Vault]:
    vault = Vault(reserve_bytes=0)
    yield vault
    vault.close()


@pytest.fixture
def shelf(tmp_path: Path, vault: Vault, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    volume_id = init_volume(tmp_path)
    row = VolumeRow(
        id=volume_id, mount_path=str(tmp_path), state="open", is_draining=False, reserved_for=None, created_at=datetime.now(UTC)
    )
    asyncio.run(vault.refresh([row]))
    shelf = Shelf(tmp_path, volume_id)
    monkeypatch.setattr(ledger.FileLookups, "owned", shelf.get_file)
    return shelf


@pytest.fixture
def delivery(vault: Vault) -> Delivery:
    return Delivery(cast("ledger.Database", None), vault, cast("Any", None))


@pytest.fixture
def services(vault: Vault, delivery: Delivery) -> Services:
    settings = Settings()
    limits = Limits(settings, Buckets())
    return cast(
        "Services", SimpleNamespace(settings=settings, vault=vault, delivery=delivery, authenticator=FakeAuthenticator(), limits=limits)
    )


class Exchange:
    """One ASGI request to the download, and what was sent in answer."""

    def __init__(self, method: str = "GET", query: str = "", headers: dict[str, str] | None = None, user: str = OWNER) -> None:
        sent = [("authorization", "Bearer good"), ("x-user-id", user), *(headers or {}).items()]
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in sent],
        }
        self.messages: list[dict[str, Any]] = []
        self.disconnected = asyncio.Event()
        self.before_send: Callable[[dict[str, Any]], Awaitable[object]] | None = None
        self._asked = False

    async def receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.before_send:
            await self.before_send(message)
        self.messages.append(message)

    @property
    def status(self) -> int:
        status: int = self.messages[0]["status"]
        return status

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.messages[1:]]

    @property
    def body(self) -> bytes:
        return b"".join(self.bodies)

    @property
    def complete(self) -> bool:
        return bool(self.messages[1:]) and not self.messages[-1].get("more_body", False)
