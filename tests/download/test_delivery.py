"""The journey out: rows and files that change under a request, damage, volumes that go away."""

import asyncio
import errno
import os
from typing import Any
from uuid import uuid4

import pytest

from server.delivery import Answer, Delivery
from server.errors import Damaged, NotFound, PreconditionFailed, RangeNotSatisfiable, VolumeUnavailable
from server.ledger.models import File
from server.vault import Vault
from server.vault.volume import Volume
from tests.download.conftest import Shelf
from tests.download.samples import FILE_ID, OWNER

DATA = bytes(range(256)) * 40
SECOND = f"users/{OWNER}/images/{FILE_ID}.2.jpg"


def asked(delivery: Delivery, method: str = "GET", user_id: str = OWNER, **headers: str) -> Answer:
    return asyncio.run(delivery.open(user_id, FILE_ID, method, {name.replace("_", "-"): value for name, value in headers.items()}))


def sent(answer: Answer) -> bytes:
    assert answer.body is not None
    assert answer.body.file is not None
    return os.pread(answer.body.file.fd, answer.body.length, answer.body.offset)


def test_the_whole_file(shelf: Shelf, delivery: Delivery) -> None:
    shelf.put(DATA)
    answer = asked(delivery)
    headers = dict(answer.headers)
    assert (answer.status, headers["content-length"], sent(answer)) == (200, str(len(DATA)), DATA)
    assert "content-range" not in headers
    assert answer.body is not None
    assert answer.body.first == DATA


def test_a_range(shelf: Shelf, delivery: Delivery) -> None:
    file = shelf.put(DATA)
    answer = asked(delivery, range="bytes=10-19")
    headers = dict(answer.headers)
    assert (answer.status, headers["content-length"], headers["content-range"]) == (206, "10", f"bytes 10-19/{len(DATA)}")
    assert sent(answer) == DATA[10:20]
    assert headers["etag"] == f'"{file.sha256.hex()}"'


def test_head_has_the_headers_of_get_and_no_body(shelf: Shelf, delivery: Delivery) -> None:
    """Range has no meaning for HEAD (section 14.2)."""
    shelf.put(DATA)
    whole = asked(delivery)
    for headers in ({}, {"range": "bytes=0-0"}, {"range": "bytes=99999999-"}):
        head = asked(delivery, "HEAD", **headers)
        assert (head.status, head.headers, head.body) == (200, whole.headers, None)


def test_not_modified_comes_before_the_range(shelf: Shelf, delivery: Delivery) -> None:
    file = shelf.put(DATA)
    for headers in ({}, {"range": "bytes=0-0"}, {"range": "bytes=99999999-"}):
        answer = asked(delivery, if_none_match=f'"{file.sha256.hex()}"', **headers)
        assert (answer.status, answer.body) == (304, None)
        assert {"etag", "cache-control"} <= set(dict(answer.headers))
        assert not {"content-length", "content-type", "content-range"} & set(dict(answer.headers))


def test_conditions_that_fail(shelf: Shelf, delivery: Delivery) -> None:
    shelf.put(DATA)
    with pytest.raises(PreconditionFailed):
        asked(delivery, if_match='"other"', range="bytes=99999999-")
    with pytest.raises(RangeNotSatisfiable):
        asked(delivery, range="bytes=99999999-")


def test_if_range(shelf: Shelf, delivery: Delivery) -> None:
    file = shelf.put(DATA)
    for if_range, status in ((f'"{file.sha256.hex()}"', 206), ('"other"', 200), ("Sat, 21 Nov 2026 12:30:15 GMT", 206)):
        assert asked(delivery, range="bytes=0-9", if_range=if_range).status == status
    assert asked(delivery, range="bytes=99999999-", if_range='"other"').status == 200


def test_the_date_of_a_file_that_was_replaced_proves_nothing(shelf: Shelf, delivery: Delivery) -> None:
    """Two contents may share a second, and a client would join parts of both."""
    shelf.put(DATA, generation=2, file_path=SECOND)
    assert asked(delivery, range="bytes=0-9", if_range="Sat, 21 Nov 2026 12:30:15 GMT").status == 200


def test_an_empty_file(shelf: Shelf, delivery: Delivery) -> None:
    shelf.put(b"")
    for headers in ({}, {"range": "bytes=0-"}, {"range": "bytes=-1"}):
        answer = asked(delivery, **headers)
        assert (answer.status, sent(answer)) == (200, b"")


def test_somebody_elses_file_is_not_found(shelf: Shelf, delivery: Delivery) -> None:
    shelf.put(DATA)
    with pytest.raises(NotFound):
        asked(delivery, user_id="user_3other")


# Changes under way


def replaced(shelf: Shelf, old: File, data: bytes) -> None:
    """What replacing does, in its order: new bytes, new row, old bytes gone."""
    shelf.put(data, generation=2, file_path=SECOND)
    shelf.path(old).unlink()


def test_replaced_between_row_and_file(shelf: Shelf, delivery: Delivery) -> None:
    old = shelf.put(DATA)
    shelf.after_look[1] = lambda: replaced(shelf, old, b"new bytes")
    answer = asked(delivery)
    assert (sent(answer), dict(answer.headers)["content-length"]) == (b"new bytes", "9")
    assert dict(answer.headers)["etag"] == f'"{shelf.rows[FILE_ID].sha256.hex()}"'


def test_conditions_are_weighed_again_for_the_new_bytes(shelf: Shelf, delivery: Delivery) -> None:
    old = shelf.put(DATA)
    shelf.after_look[1] = lambda: replaced(shelf, old, b"new bytes")
    with pytest.raises(PreconditionFailed):
        asked(delivery, if_match=f'"{old.sha256.hex()}"')


def test_deleted_between_row_and_file(shelf: Shelf, delivery: Delivery) -> None:
    old = shelf.put(DATA)

    def delete() -> None:
        del shelf.rows[FILE_ID]
        shelf.path(old).unlink()

    shelf.after_look[1] = delete
    with pytest.raises(NotFound):
        asked(delivery)


def test_an_answer_under_way_keeps_its_bytes(shelf: Shelf, delivery: Delivery) -> None:
    old = shelf.put(DATA)
    answer = asked(delivery)
    replaced(shelf, old, b"new bytes")
    assert sent(answer) == DATA


# Damage


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_row_without_its_file_is_damaged(shelf: Shelf, delivery: Delivery, method: str, caplog: pytest.LogCaptureFixture) -> None:
    file = shelf.put(DATA)
    shelf.path(file).unlink()
    with pytest.raises(Damaged):
        asked(delivery, method)
    assert shelf.looks == 2
    assert "missing" in caplog.text


@pytest.mark.parametrize("data", [DATA[:-1], DATA + b"x", b""])
def test_a_file_of_another_length_is_damaged(shelf: Shelf, delivery: Delivery, data: bytes) -> None:
    shelf.path(shelf.put(DATA)).write_bytes(data)
    with pytest.raises(Damaged):
        asked(delivery, range="bytes=0-0")


def test_a_row_that_points_elsewhere_is_damaged(shelf: Shelf, delivery: Delivery) -> None:
    file = shelf.put(DATA)
    shelf.put_row(file, file_path="../../etc/passwd")
    with pytest.raises(Damaged):
        asked(delivery)


def test_a_link_in_place_of_the_file_is_not_followed(shelf: Shelf, delivery: Delivery) -> None:
    path = shelf.path(shelf.put(DATA))
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")
    with pytest.raises(VolumeUnavailable):
        asked(delivery)


@pytest.mark.parametrize("what", ["open_stored", "pread"])
def test_a_disk_that_fails(shelf: Shelf, delivery: Delivery, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.put(DATA)

    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Volume if what == "open_stored" else os, what, fails)
    with pytest.raises(VolumeUnavailable if what == "open_stored" else Damaged):
        asked(delivery)


def test_an_unmounted_volume(shelf: Shelf, delivery: Delivery, vault: Vault) -> None:
    file = shelf.put(DATA)
    (shelf.mount / ".coffer-volume").unlink()
    asyncio.run(vault.refresh(None))
    with pytest.raises(VolumeUnavailable):
        asked(delivery)
    assert asked(delivery, if_none_match=f'"{file.sha256.hex()}"').status == 304, "needs no bytes"


def test_a_volume_nobody_knows(shelf: Shelf, delivery: Delivery) -> None:
    shelf.put_row(shelf.put(DATA), volume_id=uuid4())
    with pytest.raises(VolumeUnavailable):
        asked(delivery)
