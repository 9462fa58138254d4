"""The clients that apps use, unchanged: tus-js-client and its own end-to-end suite, Uppy in a browser, and tuspy."""

import hashlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from tusclient.client import TusClient
from tusclient.exceptions import TusCommunicationError
from tusclient.storage.filestorage import FileStorage
from tusclient.uploader.uploader import Uploader

from tests.access.test_upload_links import upload_link, usage
from tests.attack.chromium import Browser
from tests.samples import video
from tests.serving import RunningServer, ServerFactory
from tests.tus.pages import Pages
from tests.tus.speaking import ENDPOINT, offset

HERE = Path(__file__).parent / "clients"
INSTALLED = HERE.parents[2] / ".coffer" / "tests"
BODY = video(3_100_001)
CHUNK = 500_000


@pytest.fixture(scope="session")
def modules() -> Path:
    """node_modules as tests/tus/clients/package-lock.json has them, installed once."""
    locked = (HERE / "package-lock.json").read_bytes()
    directory = INSTALLED / f"tus-clients-{hashlib.sha256(locked).hexdigest()[:16]}"
    if not directory.exists():
        INSTALLED.mkdir(parents=True, exist_ok=True)
        unfinished = INSTALLED / f"unfinished-{os.getpid()}"
        unfinished.mkdir()
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, unfinished)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=unfinished, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        unfinished.rename(directory)
    return directory / "node_modules"


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "film.mp4"
    path.write_bytes(BODY)
    return path


class TusJs:
    """tus-js-client in Node."""

    def __init__(self, modules: Path, client: httpx.Client, file: Path) -> None:
        self._modules = modules
        self._client = client
        self._file = file

    def __call__(self, endpoint: str | None = None, **told: Any) -> dict[str, Any]:
        """What it says of an upload; clients/tus_js.cjs reads `told`."""
        headers = {"Authorization": self._client.headers["authorization"], "X-User-Id": self._client.headers["x-user-id"]}
        endpoint = endpoint or f"{self._client.base_url}{ENDPOINT}".replace("//api", "/api")
        told = {"endpoint": endpoint, "headers": headers, "file": str(self._file)} | told
        told["options"] = {"chunkSize": CHUNK, "metadata": {"filename": "film.mp4"}} | told.get("options", {})
        done = subprocess.run(
            ["node", str(HERE / "tus_js.cjs")],
            env=os.environ | {"NODE_PATH": str(self._modules)},
            input=json.dumps(told),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=60,
        )
        said: dict[str, Any] = json.loads(done.stdout)
        return said


@pytest.fixture
def tus_js(modules: Path, user: httpx.Client, film: Path) -> TusJs:
    return TusJs(modules, user, film)


def assert_stored(tus: RunningServer, user: httpx.Client) -> None:
    """The film is the user's only file, and nothing else is left."""
    (found,) = user.get("/api/files").json()["files"]
    assert user.get(f"/api/files/{found['id']}/download").content == BODY
    assert found["file_name"] == "film.mp4"
    assert usage(user) == (len(BODY), 0)
    assert tus.incoming() == []


# tus-js-client


def test_tus_js_client(tus: RunningServer, user: httpx.Client, tus_js: TusJs) -> None:
    said = tus_js()
    assert said["how"] == "success", said
    assert said["asked"] == [["POST", -1], *(["PATCH", at] for at in range(0, len(BODY), CHUNK))]
    assert_stored(tus, user)


@pytest.mark.parametrize(
    "told",
    [
        {"options": {"chunkSize": len(BODY)}},
        {"options": {"uploadDataDuringCreation": True}},
        {"options": {"uploadLengthDeferred": True}, "stream": True},
        {"options": {"uploadLengthDeferred": True, "uploadDataDuringCreation": True}, "stream": True},
        {"options": {"parallelUploads": 3}},
        {"options": {"parallelUploads": 4, "chunkSize": len(BODY), "metadataForPartialUploads": {"filename": "part"}}},
        {"options": {"overridePatchMethod": True}},
        {"options": {"addRequestId": True}},
        {"options": {"uploadSize": len(BODY)}, "stream": True},
    ],
    ids=lambda told: "-".join([*told["options"], *(["stream"] if told.get("stream") else [])]),
)
def test_tus_js_client_with(tus: RunningServer, user: httpx.Client, tus_js: TusJs, told: dict[str, Any]) -> None:
    said = tus_js(**told)
    assert said["how"] == "success", said
    assert_stored(tus, user)


@pytest.mark.parametrize("options", [{}, {"parallelUploads": 2}])
def test_tus_js_client_resumes_from_a_stored_url(
    tus: RunningServer, user: httpx.Client, tus_js: TusJs, tmp_path: Path, options: dict[str, Any]
) -> None:
    storage = str(tmp_path / "urls.json")
    said = tus_js(abortAfterBytes=2 * CHUNK, storage=storage, options=options)
    assert said["how"] == "aborted", said
    assert usage(user) == (0, len(BODY))
    said = tus_js(resume=True, storage=storage, options=options)  # a process of its own
    assert said["how"] == "success", said
    assert [method for method, _ in said["asked"]].count("POST") == (1 if options else 0)  # of the whole, made of its parts
    assert ["HEAD", -1] in said["asked"] and (options or ["PATCH", 0] not in said["asked"])
    assert_stored(tus, user)


def test_tus_js_client_terminates(tus: RunningServer, user: httpx.Client, tus_js: TusJs) -> None:
    said = tus_js(abortAfterBytes=CHUNK, terminate=True)
    assert (said["how"], said["asked"][-1][0]) == ("aborted", "DELETE"), said
    assert usage(user) == (0, 0) and tus.incoming() == []
    assert user.head(said["url"], headers={"Tus-Resumable": "1.0.0"}).status_code == 404


class Cutting:
    """A proxy that resets connections, each after the client has sent so many bytes; one that ends before costs none of them."""

    def __init__(self, server: RunningServer, after_bytes: list[int]) -> None:
        self._server = server
        self._after_bytes = after_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                upstream = socket.create_connection((self._server.host, self._server.port))
                left = next(iter(self._after_bytes[self.cuts :]), None)
                threading.Thread(target=self._pump, args=(client, upstream, left), daemon=True).start()
                threading.Thread(target=self._pump, args=(upstream, client, None), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, left: int | None) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if left is not None and (left := left - len(data)) < 0:
                    self.cuts += 1
                    for each in (source, sink):
                        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
                        each.shutdown(socket.SHUT_RD)
                    break
                sink.sendall(data)
            else:
                sink.shutdown(socket.SHUT_WR)
        source.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def cutting(tus: RunningServer) -> Iterator[Cutting]:
    # Each within a piece: a client may open a connection for every one.
    proxy = Cutting(tus, [400_000, 300_000, 450_000, 100_000])
    yield proxy
    proxy.close()


@pytest.mark.parametrize("options", [{}, {"chunkSize": len(BODY)}])
def test_tus_js_client_goes_on_after_cuts(
    tus: RunningServer, user: httpx.Client, tus_js: TusJs, cutting: Cutting, options: dict[str, Any]
) -> None:
    said = tus_js(f"http://127.0.0.1:{cutting.port}{ENDPOINT}", options=options)
    assert said["how"] == "success", said
    assert cutting.cuts == 4
    assert ["HEAD", -1] in said["asked"]
    assert_stored(tus, user)


def test_tus_js_client_uploads_by_a_link(tus: RunningServer, user: httpx.Client, tus_js: TusJs) -> None:
    link = upload_link(user, max_bytes=len(BODY))
    said = tus_js(headers={"Upload-Link": link["url"]})
    assert said["how"] == "success", said
    assert_stored(tus, user)
    said = tus_js(headers={"Upload-Link": link["url"]}, options={"retryDelays": []})
    assert said["how"] == "error" and "link_used" in said["error"]


def retargeted(suite: str, endpoint: str) -> str:
    """The end-to-end suite for a server at that endpoint, which stores media alone: eleven bytes of MP3 instead of "hello world"."""
    modules = re.split(r"(?m)^(?=\},\{)", suite)
    (number,) = [number for number, each in enumerate(modules) if "tusd.tusdemo.net" in each]
    module = modules[number]
    for old, new, count in (
        ("'https://tusd.tusdemo.net/files/'", json.dumps(endpoint), 2),
        (r"/^https:\/\/tusd\.tusdemo\.net\/files\//", f"new RegExp({json.dumps('^' + re.escape(endpoint))})", 2),
        ("'hello world'", json.dumps("ID3\x04" + "\0" * 7), 3),
    ):
        assert module.count(old) == count, f"the suite has changed: {old}"
        module = module.replace(old, new)
    modules[number] = module
    return "".join(modules)


def test_the_own_suite_of_tus_js_client(tus: RunningServer, user: httpx.Client, modules: Path, tmp_path: Path) -> None:
    with Pages() as pages, Browser(tmp_path / "chromium") as browser:
        pages.coffer = user
        suite = (modules / "tus-js-client" / "dist" / "browser-test-bundle.js").read_text()
        pages.serve("/suite.html", "text/html", (HERE / "suite.html").read_bytes())
        pages.serve("/suite.js", "text/javascript", retargeted(suite, pages.url + ENDPOINT).encode())
        jasmine = modules / "jasmine-core" / "lib" / "jasmine-core" / "jasmine.js"
        pages.serve("/jasmine.js", "text/javascript", jasmine.read_bytes())
        assert not browser.open(f"{pages.url}/suite.html")
        specs = pages.told()
    assert len(specs) == 2 and all(status == "passed" for _, status, _ in specs), specs


# Uppy


def test_uppy_goes_on_after_a_reload(start_server: ServerFactory, modules: Path, tmp_path: Path) -> None:
    """A page of another origin, which holds nothing but an upload link."""
    with Pages() as pages, Browser(tmp_path / "chromium") as browser:
        server = start_server(COFFER_CORS_ORIGINS=pages.url)
        pages.serve("/uppy.html", "text/html", (HERE / "uppy.html").read_bytes())
        pages.serve("/uppy.min.mjs", "text/javascript", (modules / "uppy" / "dist" / "uppy.min.mjs").read_bytes())
        pages.serve("/film", "video/mp4", BODY)
        with server.client("ada") as ada:
            link = upload_link(ada, max_bytes=len(BODY))
            query = {"endpoint": server.url + ENDPOINT, "link": link["url"]}
            assert not browser.open(f"{pages.url}/uppy.html?{urlencode(query | {'pause_after': CHUNK})}")
            said = pages.told()
            assert (said["how"], said["offset"], said["asked"][0][0]) == ("paused", CHUNK, "POST"), said
            path = f"{ENDPOINT}{link['file_id']}"
            assert CHUNK <= offset(ada, path) < len(BODY)
            assert not browser.open(f"{pages.url}/uppy.html?{urlencode(query)}")
            said = pages.told()
            assert (said["how"], said["successful"], said["failed"]) == ("complete", 1, []), said
            assert said["asked"][0][0] == "HEAD"
            assert "POST" not in {method for method, _ in said["asked"]} and ["PATCH", 0] not in said["asked"]
            assert_stored(server, ada)


# tuspy


class Film(BytesIO):
    """Stays open: tuspy closes what it has read once, and reads it again."""

    def close(self) -> None:
        pass


def tuspy(tus: RunningServer, user: httpx.Client, body: bytes = BODY, port: int | None = None, **options: Any) -> Uploader:
    headers = {"Authorization": user.headers["authorization"], "X-User-Id": user.headers["x-user-id"]}
    client = TusClient(f"http://{tus.host}:{port or tus.port}{ENDPOINT}", headers=headers)
    options = {"chunk_size": CHUNK, "metadata": {"filename": "film.mp4"}} | options
    uploader: Uploader = client.uploader(file_stream=Film(body), **options)
    return uploader


@pytest.mark.parametrize("checked", [False, True])
def test_tuspy(tus: RunningServer, user: httpx.Client, checked: bool) -> None:
    uploader = tuspy(tus, user, upload_checksum=checked)
    uploader.upload()
    assert uploader.offset == len(BODY)
    assert_stored(tus, user)


def test_tuspy_resumes_from_a_stored_url(tus: RunningServer, user: httpx.Client, tmp_path: Path) -> None:
    for stop_at in (2 * CHUNK, None):
        storage: Any = FileStorage(str(tmp_path / "urls.json"))  # type: ignore[no-untyped-call]
        uploader = tuspy(tus, user, store_url=True, url_storage=storage)
        assert uploader.offset == (2 * CHUNK if stop_at is None else 0)
        uploader.upload(stop_at=stop_at)
        storage.close()
    assert_stored(tus, user)


def test_tuspy_goes_on_after_cuts(tus: RunningServer, user: httpx.Client, cutting: Cutting) -> None:
    tuspy(tus, user, port=cutting.port, chunk_size=2 * CHUNK, retries=5, retry_delay=0).upload()
    assert cutting.cuts == 4
    assert_stored(tus, user)


def test_tuspy_is_told_what_is_wrong(tus: RunningServer, user: httpx.Client) -> None:
    with pytest.raises(TusCommunicationError) as refused:
        tuspy(tus, user, bytes(6 * 2**20 + 1)).create_url()
    assert refused.value.status_code == 413
    with pytest.raises(TusCommunicationError) as refused:
        tuspy(tus, user, b"plain text, of no use to anybody").upload()
    assert refused.value.status_code == 415
    assert usage(user) == (0, 0)
