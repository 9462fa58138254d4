"""`coffer hetzner`: volumes of Hetzner Cloud, from the order to the first upload, and larger when they fill up. See server/decisions/0023.

Each command finds out how far things have come and goes on from there, so after a crash or a lost answer it is simply run again.
Without --for-real it only says what it would do. Sizes of the cloud are whole GB, as it sells them.
"""

import os
import pwd
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import msgspec
from hcloud import APIException, Client, HCloudException
from hcloud.actions import ActionFailedException, ActionTimeoutException, BoundAction
from hcloud.servers import BoundServer
from hcloud.volumes import BoundVolume

from ops import disks
from ops.disks import Place
from ops.tool import Desk, Finding
from server.commands.failures import CommandFailed, Exit
from server.commands.output import say
from server.commands.volumes import check_owner, check_replaced, register_volume
from server.settings import Settings, variable
from server.vault.layout import INCOMING, QUARANTINE, SENTINEL, USERS

MOUNTS = Path("/srv/coffer")
SMALLEST_GB, LARGEST_GB = 10, 10_240

_LABEL = "coffer"
"""On every volume that this tool has made: it touches no other."""
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_GROWTH_SHARE = 0.1
_POLL_SECONDS = 1.0  # an action takes some seconds
_TIMEOUT_SECONDS = 30.0

_EXITS = {
    "unauthorized": Exit.USAGE,
    "invalid_input": Exit.USAGE,
    "not_found": Exit.NOT_FOUND,
    "locked": Exit.UNAVAILABLE,
    "conflict": Exit.UNAVAILABLE,
    "rate_limit_exceeded": Exit.UNAVAILABLE,
    "service_error": Exit.UNAVAILABLE,
    "unavailable": Exit.UNAVAILABLE,
    "maintenance": Exit.UNAVAILABLE,
}


@dataclass(frozen=True, slots=True)
class Price:
    """Of a GB for a month."""

    net: Decimal
    gross: Decimal
    currency: str

    def of(self, size_gb: int) -> str:
        """What so many GB cost, for people."""
        return f"{self.net * size_gb:.2f} {self.currency} a month ({self.gross * size_gb:.2f} with VAT)"


class Cloud:
    """Hetzner's API, as far as it is needed here. Answers are translated to `CommandFailed`; passing faults are retried by the library."""

    def __init__(self, settings: Settings) -> None:
        if not settings.hetzner_token:
            name = variable("hetzner_token")
            raise CommandFailed(f"{name} is not set: a token that may read and write; or {name}_FILE, the file that holds it", Exit.USAGE)
        self._client = Client(
            settings.hetzner_token,
            api_endpoint=settings.hetzner_url,
            application_name="coffer",
            poll_interval=_POLL_SECONDS,
            timeout=_TIMEOUT_SECONDS,
        )

    def price(self) -> Price:
        """Of volumes, as it is today."""
        with _translated():
            pricing = self._client.request("GET", "/pricing")["pricing"]
        each = pricing["volume"]["price_per_gb_month"]
        return Price(Decimal(each["net"]), Decimal(each["gross"]), pricing["currency"])

    def server(self, name: str) -> BoundServer:
        """The server of that name or number."""
        with _translated():
            found = self._client.servers.get_by_name(name)
            if found is None and name.isdigit():
                found = self._client.servers.get_by_id(int(name))
        if found is None:
            raise CommandFailed(f"this project has no server {name!r}: name this machine's with --server", Exit.NOT_FOUND)
        return found

    def ours(self) -> list[BoundVolume]:
        """All volumes that this tool has made."""
        with _translated():
            return self._client.volumes.get_all(label_selector=f"{_LABEL}=volume")

    def find(self, name: str) -> BoundVolume | None:
        """The volume of that name. Refuses one that this tool has not made."""
        with _translated():
            found = self._client.volumes.get_by_name(name)
        if found is not None and (found.labels or {}).get(_LABEL) != "volume":
            raise CommandFailed(
                f"volume {name} was not made by Coffer, and is left alone. To use it all the same, label it {_LABEL}=volume",
                Exit.REFUSED,
            )
        return found

    def create(self, name: str, size_gb: int, server: BoundServer) -> None:
        """Orders a volume at a server. One that an earlier order has made, whose answer was lost, is that order's."""
        try:
            with _translated(passing="uniqueness_error"):
                order = self._client.volumes.create(
                    size=size_gb,
                    name=name,
                    labels={_LABEL: "volume"},  # type: ignore[arg-type]  # the library means a dictionary, as its docstring says
                    server=server,
                    automount=False,
                )
                for action in (order.action, *order.next_actions):
                    action.wait_until_finished()
        except APIException:
            self.settle(name)

    def settle(self, name: str) -> BoundVolume:
        """The volume, when what an earlier run has begun on it is over."""
        volume = self.find(name)
        if volume is None:
            raise CommandFailed(f"there is no volume {name}", Exit.NOT_FOUND)
        with _translated():
            running = volume.get_actions(status=["running"])
            for action in running:
                with suppress(ActionFailedException):  # what it should have done is looked at afterwards
                    action.wait_until_finished()
            if running:
                volume.reload()
        return volume

    def do(self, action: Callable[[], BoundAction]) -> None:
        """Begins an action, and waits for its end."""
        with _translated():
            action().wait_until_finished()


@contextmanager
def _translated(passing: str = "") -> Iterator[None]:
    try:
        yield
    except APIException as problem:
        if problem.code == passing:
            raise
        code = _EXITS.get(str(problem.code), Exit.UNAVAILABLE if _is_server_fault(problem.code) else Exit.REFUSED)
        raise CommandFailed(f"Hetzner says: {problem.message} ({problem.code})", code) from problem
    except ActionTimeoutException as problem:
        raise CommandFailed("Hetzner is not done yet; run the same command again to go on", Exit.UNAVAILABLE) from problem
    except HCloudException as problem:
        raise CommandFailed(f"Hetzner says: {problem}") from problem
    except OSError as problem:  # the library's HTTP errors are such
        raise CommandFailed(
            f"Hetzner cannot be reached ({type(problem).__name__}); run the same command again", Exit.UNAVAILABLE
        ) from problem


def _is_server_fault(code: int | str) -> bool:
    return isinstance(code, int) and code >= 500


class _Steps:
    """Says each step, and does it when that was asked for."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.for_real: bool = desk.arguments.for_real

    async def do(self, what: str, work: Callable[[], object]) -> None:
        if self.for_real:
            await self._desk.lock.check()
        if self._desk.arguments.json:
            print(msgspec.json.encode({"step": what, "for_real": self.for_real}).decode(), flush=True)
        else:
            say(what if self.for_real else f"would {what}")
        if self.for_real:
            work()

    def end(self, done: str) -> str:
        """The summary's first words."""
        return done if self.for_real else f"nothing was changed, repeat with --for-real; {done}"


async def create(desk: Desk) -> str:
    """`coffer hetzner create`"""
    arguments, cloud, steps = desk.arguments, Cloud(desk.settings), _Steps(desk)
    server, owner = cloud.server(arguments.server), _owner(arguments.owner)
    volume = cloud.find(_checked_name(arguments.name))
    await check_replaced(desk.db, desk.settings, arguments.replace, _mount(desk), arguments.for_user)
    if volume is None:  # before it costs money
        disks.check_bare(_mount(desk))
        if arguments.replace is None:
            await check_owner(desk.db, arguments.for_user)
        size_gb = _checked_size(arguments.size_gb)
        _admit(desk, cloud.price(), cloud.ours(), size_gb)
        what = f"order volume {arguments.name} of {size_gb} GB for server {server.name}"
        await steps.do(what, lambda: cloud.create(arguments.name, size_gb, server))
    mount = await _bring_up(desk, cloud, steps, server, owner, may_format=True, for_user=arguments.for_user, replaced=arguments.replace)
    return steps.end(f"volume {arguments.name} at {mount}")


async def attach(desk: Desk) -> str:
    """`coffer hetzner attach`"""
    arguments, cloud, steps = desk.arguments, Cloud(desk.settings), _Steps(desk)
    if cloud.find(_checked_name(arguments.name)) is None:
        raise CommandFailed(f"there is no volume {arguments.name}", Exit.NOT_FOUND)
    server, owner = cloud.server(arguments.server), _owner(arguments.owner)
    mount = await _bring_up(desk, cloud, steps, server, owner, may_format=False)
    return steps.end(f"volume {arguments.name} at {mount}")


async def detach(desk: Desk) -> str:
    """`coffer hetzner detach`: its files stay on it, and its row says that it is away."""
    arguments, cloud, steps = desk.arguments, Cloud(desk.settings), _Steps(desk)
    volume = cloud.settle(_checked_name(arguments.name))
    server = cloud.server(arguments.server)
    if volume.server is not None and volume.server.id != server.id:
        raise CommandFailed(f"volume {volume.name} is attached to another server ({volume.server.id})", Exit.REFUSED)
    there = disks.mounted_at(_device(desk, volume))
    desk.vault.close()  # it holds what is to be unmounted
    place = _place(desk, there[0] if there else _mount(desk))
    await steps.do(f"unmount {place.mount} and take it out of {place.fstab} and {place.units}", lambda: disks.unmount(place))
    if volume.server is not None:
        await steps.do(f"detach volume {volume.name} from server {server.name}", lambda: cloud.do(volume.detach))
    return steps.end(f"volume {volume.name} is detached")


async def grow(desk: Desk) -> str:
    """`coffer hetzner grow`: one volume, or all that are mounted here and have less free than was said."""
    arguments, cloud, steps = desk.arguments, Cloud(desk.settings), _Steps(desk)
    if arguments.name is None and arguments.when_free_below is None:
        raise CommandFailed("say which volume, or from when on with --when-free-below", Exit.USAGE)
    server, ours, price = cloud.server(arguments.server), cloud.ours(), cloud.price()
    here = [str(each.name) for each in ours if each.server and each.server.id == server.id]
    names = [_checked_name(arguments.name)] if arguments.name else sorted(here)
    grown = 0
    for name in names:
        volume = cloud.settle(name)
        device = _device(desk, volume)
        there = disks.mounted_at(device)
        if there is None:
            text = f"Hetzner volume {name} is not mounted here"
            desk.found(Finding(kind="volume", state="look", text=text, command=f"coffer hetzner attach {name}"))
            continue
        mount, kind = there
        size_gb = int(volume.size or 0)
        if steps.for_real:  # what an earlier run had begun; else the free share would be that of the smaller file system
            disks.wait_for_size(device, size_gb * 10**9)
            disks.grow(device, mount, kind)
        free = disks.free_percent(mount)
        if arguments.when_free_below is not None and free >= arguments.when_free_below:
            continue
        new_gb = _checked_size(size_gb + (arguments.add_gb or max(SMALLEST_GB, round(size_gb * _GROWTH_SHARE))))
        _admit(desk, price, ours, new_gb - size_gb)
        what = f"grow volume {name} at {mount} ({free:.1f} % free) from {size_gb} to {new_gb} GB"
        await steps.do(what, lambda volume=volume, new_gb=new_gb: cloud.do(lambda: volume.resize(new_gb)))  # type: ignore[misc]
        if steps.for_real:
            disks.wait_for_size(device, new_gb * 10**9)
            disks.grow(device, mount, kind)
            ours = cloud.ours()
        grown += 1
    desk.figures |= {"volumes": len(names), "grown_volumes": grown, "size_gb": sum(int(each.size or 0) for each in ours)}
    return steps.end(f"{grown} of {len(names)} volumes {'are larger' if steps.for_real else 'would be larger'}")


async def _bring_up(
    desk: Desk,
    cloud: Cloud,
    steps: _Steps,
    server: BoundServer,
    owner: pwd.struct_passwd | None,
    *,
    may_format: bool,
    for_user: str | None = None,
    replaced: UUID | None = None,
) -> Path:
    """From a volume that there is to one that Coffer stores on. Returns where."""
    name, place = desk.arguments.name, _place(desk, _mount(desk))
    volume = cloud.settle(name) if cloud.find(name) else None  # None: rehearsed
    if volume is not None and volume.server is None:
        await steps.do(f"attach volume {name} to server {server.name}", lambda: cloud.do(lambda: volume.attach(server, automount=False)))
    elif volume is not None and volume.server is not None and volume.server.id != server.id:
        raise CommandFailed(f"volume {name} is attached to another server ({volume.server.id}): detach it there first", Exit.REFUSED)
    device = _device(desk, volume) if volume is not None else desk.arguments.devices / "scsi-0HC_Volume_ID"
    if steps.for_real:
        disks.wait_for(device)
    kind = disks.file_system_of(device) if device.exists() else None
    if kind is None:
        if not may_format and device.exists():
            raise CommandFailed(f"{device} has no file system: `coffer hetzner create {name}` finishes what it began", Exit.REFUSED)
        kind = desk.arguments.fs if may_format else None
        if kind is not None:
            await steps.do(f"make a file system on {device} ({kind})", lambda: disks.make_file_system(device, kind))
    elif kind not in disks.KINDS:
        raise CommandFailed(f"{device} holds {kind}, which Coffer does not mount", Exit.REFUSED)
    what = f"mount it at {place.mount}, and for good by {place.fstab} and {place.unit}"
    await steps.do(what, lambda: disks.mount(device, str(kind), place))
    role = f"a volume of Coffer, in the place of {replaced}" if replaced else "a volume of Coffer"
    await steps.do(f"make {place.mount} {role}" + (f", for user {for_user!r} alone" if for_user else ""), lambda: None)
    if steps.for_real:
        await register_volume(desk.db, place.mount, for_user, replaced)
        _give_to(owner, place.mount)
    return place.mount


def _admit(desk: Desk, price: Price, ours: list[BoundVolume], more_gb: int) -> None:
    """Says what it costs. Refuses what would take all volumes of Coffer past --max-eur a month, VAT included."""
    total_gb = sum(int(each.size or 0) for each in ours) + more_gb
    say(f"{more_gb} GB more cost {price.of(more_gb)}; all {total_gb} GB of Coffer's volumes then {price.of(total_gb)}")
    most: Decimal | None = desk.arguments.max_eur
    if most is None:
        return
    if price.currency != "EUR":
        raise CommandFailed(f"Hetzner charges {price.currency}, so --max-eur cannot be kept", Exit.REFUSED)
    if price.gross * total_gb > most:
        raise CommandFailed(f"that is more than {most} EUR a month; nothing was ordered", Exit.REFUSED)


def _owner(name: str | None) -> pwd.struct_passwd | None:
    """The account of the server: the one that was named, or `coffer`, or None where there is none of that name."""
    try:
        return pwd.getpwnam(name or "coffer")
    except KeyError:
        if name is None:
            return None
        raise CommandFailed(f"there is no account {name!r} here", Exit.USAGE) from None


def _give_to(owner: pwd.struct_passwd | None, mount: Path) -> None:
    """Hands the volume over. What lies in its directories is its own."""
    for path in (mount, *(mount / each for each in (SENTINEL, INCOMING, USERS, QUARANTINE))):
        if owner is not None and path.exists():
            os.chown(path, owner.pw_uid, owner.pw_gid)


def _place(desk: Desk, mount: Path) -> Place:
    return Place(mount, desk.arguments.fstab, desk.arguments.units)


def _mount(desk: Desk) -> Path:
    mount: Path = desk.arguments.mount or MOUNTS / desk.arguments.name
    return mount.resolve()


def _device(desk: Desk, volume: BoundVolume) -> Path:
    """By its id: /dev/sdb is another one after the next start."""
    devices: Path = desk.arguments.devices
    return devices / f"scsi-0HC_Volume_{volume.id}"


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise CommandFailed(f"{name!r} is no name for a volume: 1 to 64 of A-Z, a-z, 0-9, and inside also . _ and -", Exit.USAGE)
    return name


def _checked_size(size_gb: int | None) -> int:
    if size_gb is None:
        raise CommandFailed("say how large the volume is to be, with --size-gb", Exit.USAGE)
    if not SMALLEST_GB <= size_gb <= LARGEST_GB:
        raise CommandFailed(f"a volume has {SMALLEST_GB} to {LARGEST_GB} GB, and this one would have {size_gb}", Exit.REFUSED)
    return size_gb
