"""A small Hetzner Cloud on real HTTP, with volumes that are real disks: files behind loop devices. Written from the public API reference
(https://docs.hetzner.cloud/reference/cloud): servers, volumes, their actions, and prices.

Orders answer 201 with actions that are running; each look at an action brings it nearer to its end, and only at its end is the volume
attached, detached or larger. Meanwhile the volume is locked, and other orders for it answer 423.
"""

import json
import re
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "a-token-of-64-characters-as-hetzner-makes-them-0123456789abcdefg"
GIB = 2**30
_LOOKS = 2

Json = dict[str, Any]


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str, message: str = "no") -> None:
        super().__init__(code)
        self.status, self.code, self.message = status, code, message


class HetznerCloud:
    """A project with one server, `media-1`, that is this machine, and another, `media-2`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.devices = directory / "by-id"
        self.devices.mkdir()
        self.volumes: dict[int, Json] = {}
        self.actions: dict[int, Json] = {}
        self.prices: Json = {"net": "0.0440000000", "gross": "0.0523600000"}
        self.currency = "EUR"
        self.requests: list[str] = []
        self.faults: list[tuple[str, Refusal | str]] = []
        """What is to go wrong: the beginning of a request and its refusal, or `drop` (it is done, and its answer is lost), or `fail` (its
        action ends with an error). Each happens once."""
        self._effects: dict[int, Callable[[], None]] = {}
        self._lock = threading.Lock()
        self._ids = iter(range(1_000, 10_000))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        """Ends the server, and lets go of all disks."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for volume in self.volumes.values():
            self._unplug(volume["id"])

    def named(self, name: str) -> Json:
        return next(each for each in self.volumes.values() if each["name"] == name)

    def device(self, name: str) -> Path:
        return self.devices / f"scsi-0HC_Volume_{self.named(name)['id']}"

    def writes(self) -> list[str]:
        """What was asked for that changes something, without ids."""
        return [re.sub(r"\d+", "ID", each) for each in self.requests if not each.startswith("GET")]

    # Disks

    def _file(self, volume_id: int) -> Path:
        return self.directory / f"{volume_id}.disk"

    def _plug(self, volume_id: int) -> None:
        loop = subprocess.run(
            ["losetup", "--find", "--show", self._file(volume_id)], check=True, capture_output=True, text=True
        ).stdout.strip()
        (self.devices / f"scsi-0HC_Volume_{volume_id}").symlink_to(loop)

    def _unplug(self, volume_id: int) -> None:
        link = self.devices / f"scsi-0HC_Volume_{volume_id}"
        if link.is_symlink():
            subprocess.run(["losetup", "--detach", link.resolve()], check=False)
            link.unlink()

    def _resize(self, volume_id: int, size_gb: int) -> None:
        with self._file(volume_id).open("ab") as disk:
            disk.truncate(size_gb * GIB)
        self.volumes[volume_id]["size"] = size_gb
        link = self.devices / f"scsi-0HC_Volume_{volume_id}"
        if link.is_symlink():
            subprocess.run(["losetup", "--set-capacity", link.resolve()], check=True)

    def _attach(self, volume_id: int, server_id: int) -> None:
        self.volumes[volume_id]["server"] = server_id
        if server_id == 1:
            self._plug(volume_id)

    def _detach(self, volume_id: int) -> None:
        self.volumes[volume_id]["server"] = None
        self._unplug(volume_id)

    # The API

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Json) -> Json:
        match method, path.split("/")[1:]:
            case "GET", ["pricing"]:
                return {"pricing": {"currency": self.currency, "vat_rate": "19.000000", "volume": {"price_per_gb_month": self.prices}}}
            case "GET", ["servers"]:
                return self._page("servers", [each for each in _SERVERS if each["name"] in query.get("name", [each["name"]])])
            case "GET", ["servers", number]:
                return {"server": next(each for each in _SERVERS if each["id"] == int(number))}
            case "GET", ["volumes"]:
                return self._page("volumes", [each for each in self.volumes.values() if _is_selected(each, query)])
            case "POST", ["volumes"]:
                return self._create(body)
            case "GET", ["volumes", number]:
                return {"volume": self._volume(number)}
            case "GET", ["volumes", number, "actions"]:
                of_volume = [each for each in self.actions.values() if each["resources"][0]["id"] == int(number)]
                return self._page("actions", [each for each in of_volume if each["status"] in query.get("status", [each["status"]])])
            case "POST", ["volumes", number, "actions", what]:
                return {"action": self._order(what, self._volume(number), body)}
            case "GET", ["actions", number]:
                return {"action": self._look(int(number))}
        raise Refusal(404, "not_found")

    def _page(self, name: str, found: list[Json]) -> Json:
        pages = {"page": 1, "per_page": 50, "previous_page": None, "next_page": None, "last_page": 1, "total_entries": len(found)}
        return {name: found, "meta": {"pagination": pages}}

    def _volume(self, number: str) -> Json:
        if int(number) not in self.volumes:
            raise Refusal(404, "not_found")
        return self.volumes[int(number)]

    def _create(self, body: Json) -> Json:
        if not 10 <= body["size"] <= 10_240 or "automount" not in body or "format" in body:
            raise Refusal(400, "invalid_input")
        if any(each["name"] == body["name"] for each in self.volumes.values()):
            raise Refusal(409, "uniqueness_error")
        volume_id = next(self._ids)
        self.volumes[volume_id] = {
            "id": volume_id,
            "name": body["name"],
            "size": body["size"],
            "labels": body["labels"],
            "server": None,
            "status": "available",
            "location": {"id": 1, "name": "fsn1"},
            "linux_device": f"/dev/disk/by-id/scsi-0HC_Volume_{volume_id}",
            "protection": {"delete": False},
            "created": "2026-01-30T23:50:00+00:00",
            "format": None,
        }
        with self._file(volume_id).open("wb") as disk:
            disk.truncate(body["size"] * GIB)
        made = self._begin("create_volume", volume_id, lambda: None)
        attached = self._begin("attach_volume", volume_id, lambda: self._attach(volume_id, body["server"]))
        return {"volume": self.volumes[volume_id], "action": made, "next_actions": [attached]}

    def _order(self, what: str, volume: Json, body: Json) -> Json:
        volume_id = volume["id"]
        if any(each["status"] == "running" and each["resources"][0]["id"] == volume_id for each in self.actions.values()):
            raise Refusal(423, "locked")
        match what:
            case "attach" if volume["server"] is None:
                return self._begin("attach_volume", volume_id, lambda: self._attach(volume_id, body["server"]))
            case "detach" if volume["server"] is not None:
                return self._begin("detach_volume", volume_id, lambda: self._detach(volume_id))
            case "resize" if body["size"] > volume["size"]:
                return self._begin("resize_volume", volume_id, lambda: self._resize(volume_id, body["size"]))
        raise Refusal(422, "invalid_input")

    def _begin(self, command: str, volume_id: int, effect: Callable[[], None]) -> Json:
        action_id = next(self._ids)
        self._effects[action_id] = effect
        self.actions[action_id] = {
            "id": action_id,
            "command": command,
            "status": "running",
            "progress": 0,
            "started": "2026-01-30T23:55:00+00:00",
            "finished": None,
            "resources": [{"id": volume_id, "type": "volume"}],
            "error": None,
        }
        return self.actions[action_id]

    def _look(self, action_id: int) -> Json:
        action = self.actions[action_id]
        if action["status"] == "running":
            action["progress"] += 100 // _LOOKS
            if action["progress"] >= 100:
                if self._fault(f"{action['command']}") == "fail":
                    action |= {"status": "error", "error": {"code": "action_failed", "message": "Action failed"}}
                else:
                    self._effects.pop(action_id)()
                    action |= {"status": "success", "finished": "2026-01-30T23:56:00+00:00"}
        return action

    def _fault(self, what: str) -> Refusal | str | None:
        for number, (beginning, fault) in enumerate(self.faults):
            if what.startswith(beginning):
                del self.faults[number]
                return fault
        return None

    def _handler(cloud) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - the handler's own is self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _respond(self) -> None:
                parts = urlsplit(self.path)
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
                with cloud._lock:
                    request = f"{self.command} {parts.path.removeprefix('/v1')}"
                    cloud.requests.append(request)
                    fault = cloud._fault(request)
                    try:
                        if self.headers["Authorization"] != f"Bearer {TOKEN}":
                            raise Refusal(401, "unauthorized", "unable to authenticate")
                        if isinstance(fault, Refusal):
                            raise fault
                        answer = cloud.answer(self.command, parts.path.removeprefix("/v1"), parse_qs(parts.query), body)
                        status = 201 if self.command == "POST" else 200
                    except Refusal as refusal:
                        status, answer = refusal.status, {"error": {"code": refusal.code, "message": refusal.message, "details": None}}
                    text = json.dumps(answer).encode()
                if fault == "drop":
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = _respond  # noqa: N815 - the library's names

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
                pass

        return Handler


_SERVERS = [{"id": number, "name": f"media-{number}", "status": "running", "created": "2026-01-01T00:00:00+00:00"} for number in (1, 2)]


def _is_selected(volume: Json, query: dict[str, list[str]]) -> bool:
    for selector in query.get("label_selector", ()):
        name, _, value = selector.partition("=")
        if volume["labels"].get(name) != value:
            return False
    return volume["name"] in query.get("name", [volume["name"]])
