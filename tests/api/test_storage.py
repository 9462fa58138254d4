"""`GET /api/storage/usage`."""

from tests.samples import image, video
from tests.serving import RunningServer


def test_a_user_who_has_stored_nothing_has_the_default_limit(api: RunningServer) -> None:
    with api.client("nobody yet") as client:
        usage = client.get("/api/storage/usage").json()
    nothing = {"file_count": 0, "total_bytes": 0}
    assert usage == {
        "used_bytes": 0,
        "reserved_bytes": 0,
        "limit_bytes": 10 * 2**30,
        "available_bytes": 10 * 2**30,
        "percent": 0.0,
        "file_count": 0,
        "preview_bytes": 0,
        "by_type": dict.fromkeys(("video", "image", "scene", "project", "audio"), nothing),
    }


def test_usage_follows_what_is_stored(api: RunningServer) -> None:
    api.set_quota("storage", 8_000)
    with api.client("storage") as client:
        ids = [client.post("/api/files/upload", content=body).json()["id"] for body in (image(1_000), image(1_000, 1), video(3_000))]
        usage = client.get("/api/storage/usage").json()
        assert (usage["used_bytes"], usage["limit_bytes"], usage["available_bytes"], usage["percent"]) == (5_000, 8_000, 3_000, 62.5)
        assert usage["by_type"]["image"] == {"file_count": 2, "total_bytes": 2_000}
        assert usage["by_type"]["video"] == {"file_count": 1, "total_bytes": 3_000}
        client.delete(f"/api/files/{ids[2]}")
        assert client.get("/api/storage/usage").json()["by_type"]["video"] == {"file_count": 0, "total_bytes": 0}


def test_limits_that_are_no_division(api: RunningServer) -> None:
    with api.client("edges") as client:
        client.post("/api/files/upload", content=image(1_000))
        for limit, available, percent in ((None, None, None), (0, 0, 100.0), (500, 0, 200.0), (1_000, 0, 100.0)):
            api.set_quota("edges", limit)
            usage = client.get("/api/storage/usage").json()
            assert (usage["limit_bytes"], usage["available_bytes"], usage["percent"]) == (limit, available, percent)
