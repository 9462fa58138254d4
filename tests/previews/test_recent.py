"""Links to previews that are asked for again: remembered for a moment, and over with their original."""

import httpx
import pytest

from server.delivery import recent
from server.delivery.previews import AwaitedPreviews, PreviewFile
from tests.download.here import serving_here, settings_of
from tests.previews.conftest import WorkerFactory
from tests.previews.test_links import link, ready, stored
from tests.serving import RunningServer


def test_previews_are_remembered_and_end_with_their_original(
    server: RunningServer, start_worker: WorkerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent, "KEPT_SECONDS", 1_000.0)  # so that what ends it is not the second's end
    asked = []
    find = AwaitedPreviews.find

    async def counted(self: AwaitedPreviews, *arguments: object) -> PreviewFile:
        asked.append(arguments)
        return await find(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(AwaitedPreviews, "find", counted)
    start_worker()
    with (
        server.client("ada") as ada,
        serving_here(settings_of(server)) as here,
        httpx.Client(base_url=f"http://127.0.0.1:{here.port}", timeout=40) as browser,
    ):
        for end in ("revoked", "deleted", "preview lost"):
            file_id = stored(ada)
            ready(ada, file_id)
            url = link(ada, file_id, "320")
            first = browser.get(url)
            assert first.status_code == 200
            asked.clear()
            for _ in range(3):
                again = browser.get(url)
                assert (again.status_code, again.content, again.headers["etag"]) == (200, first.content, first.headers["etag"])
            assert asked == []
            # By another process, which tells nobody.
            match end:
                case "revoked":
                    assert ada.post(f"/api/files/{file_id}/revoke-links").status_code == 200
                    assert browser.get(url).status_code == 404
                case "deleted":
                    assert ada.delete(f"/api/files/{file_id}").status_code == 204
                    assert browser.get(url).status_code == 404
                case _:
                    (preview,) = (server.volume / "users" / "ada" / "previews" / file_id).glob("320*")
                    preview.unlink()
                    assert browser.get(url).status_code == 200 and asked  # it was made again
        # What is negotiated depends on who asks.
        url = link(ada, stored(ada), {"width": 200, "format": "auto"})
        kinds = [browser.get(url, headers={"Accept": accept}).headers["content-type"] for accept in ("image/webp", "image/avif", "*/*")]
        assert kinds == ["image/webp", "image/avif", "image/jpeg"]
