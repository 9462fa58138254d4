"""What a refused request looks like from outside, whoever refused it."""

import json
import socket

import httpx
import pytest

from server.api.protocol import MOST_HEAD_BYTES
from tests.samples import image
from tests.serving import RunningServer
from tests.waiting import until

MISSING = "01890000-0000-7000-8000-000000000000"
PROBLEM = "application/problem+json"


def without_id(answer: httpx.Response) -> tuple[int, object]:
    assert answer.headers["content-type"] == PROBLEM
    body = answer.json()
    assert body.pop("request_id") == answer.headers["x-request-id"]
    return answer.status_code, body


def test_a_missing_file_anothers_file_and_a_malformed_id_look_alike(api: RunningServer) -> None:
    with api.client("ada") as ada, api.client("bob") as bob:
        hers = ada.post("/api/files/upload", content=image()).json()["id"]
        routes: list[tuple[str, str, object]] = [
            ("GET", "", None),
            ("PATCH", "", {"file_name": "x"}),
            ("DELETE", "", None),
            ("POST", "/favorite", None),
            ("PUT", "/tags", {"tags": []}),
            ("POST", "/copy", None),
            ("PUT", "/content", None),
            ("GET", "/download", None),
        ]
        for method, tail, body in routes:
            answers = {
                json.dumps(without_id(bob.request(method, f"/api/files/{file_id}{tail}", json=body)))
                for file_id in (MISSING, hers, "nonsense", "%00", MISSING[:-1], f"{{{MISSING}}}"[:36])
            }
            assert len(answers) == 1 and json.loads(answers.pop())[0] == 404, (method, tail)
            head = bob.head(f"/api/files/{hers}/download")
            assert (head.status_code, head.content) == (404, b"")
        assert bob.post("/api/files/delete", json={"ids": [hers]}).json()["results"] == [{"id": hers, "status": "not_found"}]
        assert ada.get(f"/api/files/{hers}/download").content == image()


def test_unknown_routes_and_methods(api: RunningServer) -> None:
    with api.client("ada") as client:
        assert without_id(client.get("/api/nowhere"))[0] == 404
        assert without_id(client.get("/"))[0] == 404
        for method, path in (
            ("GET", "/api/files/upload"),
            ("POST", f"/api/files/{MISSING}/download"),
            ("PUT", "/api/files"),
            ("TRACE", "/health/live"),
        ):
            answer = client.request(method, path)
            status, body = without_id(answer)
            assert status == 405 and isinstance(body, dict) and body["code"] == "method_not_allowed"
            assert method not in answer.headers["allow"] and answer.headers["allow"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b" ", "body"),
        (b"null", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b"\xff", "body"),
        (b'{"file_name": "\xff"}', "body"),
        (b'{"metadata": {"\xc3": 1}}', "body"),
        (b'{"nmae": "x"}', "body"),
        (b'{"file_name": 7}', "file_name"),
        (b'{"file_name": ""}', "file_name"),
        (b'{"file_name": "a\\u0000b"}', "file_name"),
        (b'{"metadata": []}', "metadata"),
        (b'{"metadata": {"a": "\\u0000"}}', "metadata"),
        (b'{"metadata": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}", "metadata"),
        (b'{"metadata": ' + b'{"a":' * 90_000 + b"1" + b"}" * 90_000 + b"}", "body"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bodies_that_cannot_be_accepted(api: RunningServer, body: bytes, field: str) -> None:
    with api.client("ada") as client:
        status, problem = without_id(client.patch(f"/api/files/{MISSING}", content=body))
        assert status == 400 and isinstance(problem, dict)
        assert (problem["code"], problem["field"]) == ("invalid_request", field) and problem["reason"]
        assert "'data'" not in str(problem)


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("PUT", "/api/users/strict/quota", b'{"max_bytes": "10"}', "max_bytes"),
        ("PUT", "/api/users/strict/quota", b'{"max_bytes": 10.0}', "max_bytes"),
        ("PUT", "/api/users/strict/quota", b'{"max_bytes": "null"}', "max_bytes"),
        ("POST", f"/api/files/{MISSING}/favorite", b'{"is_favorite": "true"}', "is_favorite"),
        ("POST", f"/api/files/{MISSING}/favorite", b'{"is_favorite": 1}', "is_favorite"),
        ("PUT", f"/api/files/{MISSING}/tags", b'{"tags": [1]}', "tags"),
        ("POST", "/api/files/delete", b'{"ids": ["' + b"x" * 65 + b'"]}', "ids"),
        ("PATCH", f"/api/files/{MISSING}", b'{"package_name": 1}', "package_name"),
    ],
    ids=str,
)
def test_bodies_are_read_strictly(api: RunningServer, method: str, path: str, body: bytes, field: str) -> None:
    with api.client("ada") as client:
        status, problem = without_id(client.request(method, path, content=body))
        assert status == 400 and isinstance(problem, dict)
        assert (problem["code"], problem["field"]) == ("invalid_request", field) and problem["reason"].startswith("Expected ")


def test_an_empty_body_is_told_so(api: RunningServer) -> None:
    with api.client("ada") as client:
        problem = client.patch(f"/api/files/{MISSING}").json()
        assert (problem["field"], problem["reason"]) == ("body", "is empty; send a JSON object")


def listing_routes(api: RunningServer) -> dict[tuple[str, str], list[str]]:
    """The JSON routes that have query parameters, by method and path, and those."""
    described = httpx.get(f"{api.url}/schema/openapi.json").json()["paths"]
    return {
        (method.upper(), path): parameters
        for path, item in described.items()
        for method, operation in item.items()
        if operation["tags"] not in (["Bytes"], ["Pipelines"])
        and (parameters := [each["name"] for each in operation.get("parameters", ()) if each.get("in") == "query"])
    }


def test_unknown_and_repeated_parameters_are_refused(api: RunningServer) -> None:
    routes = listing_routes(api)
    assert routes.keys() == {
        ("GET", "/api/files"),
        ("GET", "/api/files/{file_id}"),
        ("DELETE", "/api/files/{file_id}"),
        ("GET", "/api/trash"),
        ("GET", "/api/users"),
        ("GET", "/api/storage/{file_id}/url"),
        ("GET", "/api/audit"),
        ("GET", "/api/assets"),
        ("GET", "/api/generate"),
        ("GET", "/api/generate/status/{job_id}"),
        ("GET", "/api/media"),
        ("GET", "/api/webhooks/{webhook_id}/dead-letters"),
        ("GET", "/api/webhooks/callbacks/dead-letters"),
    }
    with api.client("ada") as client:
        webhook_id = client.post("/api/webhooks", json={"url": "https://app.example.com/"}).json()["id"]
        for (method, template), parameters in routes.items():
            path = template.replace("{file_id}", MISSING).replace("{job_id}", MISSING).replace("{webhook_id}", webhook_id)
            for name in ("nonsense", "Limit", "file_type", "request", "", "ü&"):
                problem = client.request(method, path, params={name: "1"}).json()
                assert (problem["status"], problem["code"], problem["field"]) == (400, "invalid_request", name)
                assert all(each in problem["reason"] for each in parameters)
            for name in parameters:
                for twice in (["1", "2"], ["1", "1"]):
                    problem = client.request(method, path, params={name: twice}).json()
                    assert (problem["code"], problem["field"]) == ("invalid_request", name) and "once" in problem["reason"]
            assert len(client.request(method, path, params={"x" * 5_000: "1"}).json()["field"]) == 100
            for query in ("limit=%ff", "%ff", "&".join(f"a{number}" for number in range(101))):
                assert client.request(method, f"{path}?{query}").json()["field"] == "query"
            if "limit" in parameters:
                assert client.get(f"{path}?&limit=1&").status_code == 200
            assert httpx.request(method, f"{api.url}{path}?nonsense").status_code == 401  # who asks comes first
        client.delete(f"/api/webhooks/{webhook_id}").raise_for_status()


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("sort=bogus", "must be one of created, -created, name, -name, size, -size"),
        ("sort=", "must be one of created, -created, name, -name, size, -size"),
        ("type=picture", "must be one of video, image, scene, project, audio"),
        ("favorite=perhaps", "must be true or false"),
        ("limit=abc", "must be a whole number from 1 to 200"),
        ("limit=0", "must be a whole number from 1 to 200"),
        ("limit=201", "must be a whole number from 1 to 200"),
        ("limit=1.5", "must be a whole number from 1 to 200"),
        ("limit=", "must be a whole number from 1 to 200"),
    ],
)
def test_a_refused_parameter_says_what_is_permitted(api: RunningServer, query: str, reason: str) -> None:
    with api.client("ada") as client:
        for path in ("/api/files", "/api/users") if query.startswith("limit") else ("/api/files",):
            status, problem = without_id(client.get(f"{path}?{query}"))
            assert status == 400 and isinstance(problem, dict)
            assert (problem["code"], problem["field"], problem["reason"]) == ("invalid_request", query.partition("=")[0], reason)


def test_a_body_over_a_mebibyte_is_refused_declared_or_not(api: RunningServer) -> None:
    with api.client("ada") as client:
        for content in (b" " * (2**20 + 1), iter([b" " * 2**20, b" "])):
            status, problem = without_id(client.patch(f"/api/files/{MISSING}", content=content))
            assert status == 413 and isinstance(problem, dict) and problem["code"] == "body_too_large"


def test_request_ids_are_taken_over_when_they_are_sane(api: RunningServer) -> None:
    with api.client("ada") as client:
        for sane in ("a", "A-b_c.9", "x" * 64):
            assert client.get("/api/files", headers={"X-Request-Id": sane}).headers["x-request-id"] == sane
        for other in ("", "x" * 65, "a b", "a,b", '"', "é".encode()):
            answer = client.get("/api/files", headers=[(b"X-Request-Id", other if isinstance(other, bytes) else other.encode())])
            assert len(answer.headers["x-request-id"]) == 36
        assert client.get("/api/files").headers["x-request-id"] != client.get("/api/files").headers["x-request-id"]


def test_an_early_refusal_leaves_the_connection_usable(api: RunningServer) -> None:
    """The body that nobody wanted is read away, and the next request on the same connection is answered."""
    body = image(3_000_000)
    with socket.create_connection((api.host, api.port), timeout=20) as connection:
        head = f"POST /api/files/upload HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = b""
        while piece := connection.recv(65_536):
            answers += piece
    assert answers.startswith(b"HTTP/1.1 401") and answers.count(b"HTTP/1.1 200 OK") == 1


def test_answers_are_neither_cached_nor_sniffed(api: RunningServer) -> None:
    with api.client("ada") as client:
        for answer in (client.get("/api/files"), client.get("/api/storage/usage"), client.get("/api/nowhere"), client.get("/health/ready")):
            assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == ("no-store", "nosniff")


def test_a_client_that_leaves_is_no_error(api: RunningServer) -> None:
    with socket.create_connection((api.host, api.port), timeout=20) as connection:
        head = f"POST /api/files/upload HTTP/1.1\r\nHost: x\r\nX-Request-Id: leaver\r\nAuthorization: Bearer {api.api_key}\r\n"
        connection.sendall(f"{head}X-User-Id: ada\r\nContent-Length: 100000\r\n\r\n".encode() + image(50_000))

    (line,) = until(lambda: [json.loads(line) for line in api.logged().splitlines() if '"leaver"' in line])
    assert (line["logger"], line["level"], line["status"]) == ("coffer.access", "info", 499)


@pytest.mark.parametrize("endless", ["header", "headers", "trailer", "path"])
def test_a_head_without_end_is_hung_up_on(api: RunningServer, endless: str) -> None:
    credentials = f"Authorization: Bearer {api.api_key}\r\nX-User-Id: ada\r\n"
    piece = b"a" * 1_000
    with socket.create_connection((api.host, api.port), timeout=20) as connection:
        match endless:
            case "header":
                connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-A: ")
            case "headers":
                connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n")
                piece = b"X-A: " + b"a" * 993 + b"\r\n"
            case "trailer":
                head = f"POST /api/files/upload HTTP/1.1\r\nHost: x\r\n{credentials}Transfer-Encoding: chunked\r\n\r\n"
                connection.sendall(f"{head}5\r\nhello\r\n0\r\nX-A: ".encode())
            case "path":
                connection.sendall(b"GET /")
        before = api.peak_memory_bytes()
        with pytest.raises(OSError):  # reset, or a broken pipe
            for _ in range(50_000):
                connection.sendall(piece)
        assert api.peak_memory_bytes() - before < 4 * 2**20


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health/live HTTP/9.9\r\n\r\n", 400),
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\nX\0: a\r\n\r\n", 400),
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n", 400),
        # Not a byte beyond the limit: what the server has not read when it hangs up could cost us its answer.
        (b"GET /health/live#fragment HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-A: ".ljust(MOST_HEAD_BYTES + 1, b"a"), 431),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_is_no_http_is_a_problem_too(api: RunningServer, sent: bytes, status: int) -> None:
    with socket.create_connection((api.host, api.port), timeout=20) as connection:
        connection.sendall(sent)
        answer = whole_answer(connection)
    body = without_id(answer)
    assert body[0] == status and isinstance(body[1], dict)
    assert (body[1]["status"], body[1]["code"]) == (status, "http_error")
    assert (answer.headers["connection"], answer.headers["cache-control"]) == ("close", "no-store")
    until(lambda: [line for line in api.logged().splitlines() if answer.headers["x-request-id"] in line])


def whole_answer(connection: socket.socket) -> httpx.Response:
    """What was answered until the server hung up, which must be one whole answer."""
    received = b""
    while piece := connection.recv(65_536):
        received += piece
    head, _, content = received.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    answer = httpx.Response(int(first.split(" ")[1]), headers=dict(line.split(": ", 1) for line in lines), content=content)
    assert answer.headers["content-length"] == str(len(content))
    return answer


def test_a_head_of_ordinary_size_is_fine(api: RunningServer) -> None:
    with api.client("ada") as client:
        assert client.get("/api/files", headers={"X-Large": "a" * 30_000}).status_code == 200


def test_a_trailer_is_no_header(api: RunningServer) -> None:
    """Whoever may send bytes behind the head must not be able to name another user."""
    body = image()
    with socket.create_connection((api.host, api.port), timeout=20) as connection:
        head = f"POST /api/files/upload HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.api_key}\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(f"{head}{len(body):x}\r\n".encode() + body + b"\r\n0\r\nX-User-Id: mallory\r\n\r\n")
        assert connection.recv(100).split(b" ", 2)[1] == b"400"
