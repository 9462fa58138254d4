"""Prometheus metrics, right also when several processes serve.

With one process the values live in memory. With several, prometheus-client keeps each process's values in files of the
directory `PROMETHEUS_MULTIPROC_DIR`, which must be set before the processes start (`shared_by_processes`), and any of them
answers a scrape for all.
"""

import itertools
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from server.kinds import PREVIEWED

MEDIA_TYPE = "text/plain; version=0.0.4"
JOB_ENDS = ("completed", "partly_completed", "failed", "cancelled", "expired")
VOLUME_STATES = ("open", "full", "read_only", "unavailable")

_DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
# From a small look-up to a large upload over a slow line.
_BUCKETS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


@dataclass(frozen=True, slots=True)
class VolumeFacts:
    """A volume at the moment of a scrape. `free_bytes` is None while nobody can tell; of 0 inodes nothing is told."""

    volume_id: str
    state: str
    free_bytes: int | None
    size_bytes: int = 0
    inodes: int = 0
    free_inodes: int = 0


@dataclass(frozen=True, slots=True)
class PreviewFacts:
    """Files that wait for their preview, and those whose preview failed, by kind, at the moment of a scrape.

    `made` are what the workers have counted, by kind and state: files and seconds by the bound of their seconds, ascending.
    """

    waiting: int
    failed: Mapping[str, int]
    made: Mapping[tuple[str, str], Sequence[tuple[float, int, float]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BackupState:
    """Backups at the moment of a scrape. Times are Unix times; None: there never was one."""

    last_good_at: float | None
    last_proof_at: float | None
    are_proven: bool
    uploads_are_stopped: bool


@dataclass(frozen=True, slots=True)
class WorkFacts:
    """Generation and events out, some seconds ago at most. `ended_…` are of the last hour; `counts` are by work and result, since ever."""

    open_jobs: Mapping[str, int]
    ended_jobs: Mapping[str, int]
    ended_outputs: Mapping[str, int]
    oldest_queued_seconds: float
    fetching_outputs: int
    pending_deliveries: int
    dead_letters: int
    oldest_delivery_seconds: float
    counts: Mapping[tuple[str, str], int]


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """All users and files together, some seconds ago at most. No user has a series of their own: there may be a million.

    `quota_bytes` is what was promised to users whose storage is limited; `warned_users` have used so many percent of theirs.
    """

    users: int
    files: int
    stored_bytes: float
    reserved_bytes: float
    quota_bytes: float
    unlimited_users: int
    warned_users: Mapping[int, int]
    damaged_files: int
    reservation_overdue_seconds: float
    tombstone_age_seconds: float
    worker_connections: int


class Metrics:
    """The metrics of this process. Labels come from route templates and fixed words, so their number is bounded."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        if _DIRECTORY_VARIABLE not in os.environ:
            ProcessCollector(registry=self._registry)
        self._requests = Counter("coffer_http_requests", "Requests answered.", ("route", "method", "status"), registry=self._registry)
        self._seconds = Histogram(
            "coffer_http_request_duration_seconds",
            "Time from a request's head to the end of its answer.",
            ("route", "method"),
            buckets=_BUCKETS_SECONDS,
            registry=self._registry,
        )
        self._received = Counter("coffer_http_received_bytes", "Bytes of request bodies read.", registry=self._registry)
        self._sent = Counter("coffer_http_sent_bytes", "Bytes of response bodies sent.", registry=self._registry)
        # livesum: a process that was killed in mid-request must not be counted for ever.
        self._in_flight = Gauge(
            "coffer_http_requests_in_flight", "Requests under way.", registry=self._registry, multiprocess_mode="livesum"
        )
        self._scans = Counter(
            "coffer_scans", "Files that came to the virus scanner, by what became of them.", ("result",), registry=self._registry
        )
        self._scan_seconds = Histogram(
            "coffer_scan_duration_seconds",
            "Time from a scan's request to its verdict, waiting for its turn included.",
            buckets=_BUCKETS_SECONDS,
            registry=self._registry,
        )
        # Looking labels up in prometheus-client costs more than counting.
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def started(self) -> None:
        """Counts a request as under way until `finished`, which must follow however the request ends."""
        self._in_flight.inc()

    def finished(self, route: str, method: str, status: int, seconds: float, *, bytes_in: int, bytes_out: int) -> None:
        """Counts one answered request. `route` must be a template, `method` and `status` as in HTTP."""
        key = (route, method, status)
        children = self._children.get(key)
        if children is None:
            children = self._children[key] = (self._requests.labels(route, method, str(status)), self._seconds.labels(route, method))
        children[0].inc()
        children[1].observe(seconds)
        self._in_flight.dec()
        if bytes_in:
            self._received.inc(bytes_in)
        if bytes_out:
            self._sent.inc(bytes_out)

    def scanned(self, result: str, seconds: float | None) -> None:
        """Counts one file that came to the scanner. `result` is one of a few fixed words; None: the scan had no need to begin."""
        self._scans.labels(result).inc()
        if seconds is not None:
            self._scan_seconds.observe(seconds)

    def expose(
        self,
        volumes: Iterable[VolumeFacts],
        previews: PreviewFacts | None = None,
        store: StoreFacts | None = None,
        backups: BackupState | None = None,
        work: WorkFacts | None = None,
    ) -> bytes:
        """The text of a scrape; without what nobody can tell while the database is away.

        Reads files when several processes serve, so run it in a thread.
        """
        registry = self._registry
        if directory := os.environ.get(_DIRECTORY_VARIABLE):
            _forget_dead_processes(Path(directory))
            registry = CollectorRegistry()
            MultiProcessCollector(registry, directory)  # type: ignore[no-untyped-call]
        own = CollectorRegistry()
        own.register(_Volumes(list(volumes)))
        if previews is not None:
            own.register(_Previews(previews))
        own.register(_Store(store))
        if backups is not None:
            own.register(_Backups(backups))
        if work is not None:
            own.register(_Work(work))
        return generate_latest(registry) + generate_latest(own)


class _Volumes(Collector):
    def __init__(self, volumes: list[VolumeFacts]) -> None:
        self._volumes = volumes

    def collect(self) -> Iterable[Metric]:
        free = GaugeMetricFamily("coffer_volume_free_bytes", "Bytes that uploads may still take, above the reserve.", labels=("volume",))
        state = GaugeMetricFamily("coffer_volume_state", "1 for the state that the volume is in.", labels=("volume", "state"))
        size = GaugeMetricFamily("coffer_volume_size_bytes", "Size of the volume's file system.", labels=("volume",))
        inodes = GaugeMetricFamily("coffer_volume_inodes", "Files that the volume's file system can name.", labels=("volume",))
        free_inodes = GaugeMetricFamily("coffer_volume_free_inodes", "Files that it can still take.", labels=("volume",))
        for volume in self._volumes:
            if volume.free_bytes is not None:
                free.add_metric((volume.volume_id,), volume.free_bytes)
                size.add_metric((volume.volume_id,), volume.size_bytes)
                if volume.inodes:
                    inodes.add_metric((volume.volume_id,), volume.inodes)
                    free_inodes.add_metric((volume.volume_id,), volume.free_inodes)
            for each in VOLUME_STATES:
                state.add_metric((volume.volume_id, each), float(each == volume.state))
        return (free, size, inodes, free_inodes, state)


class _Previews(Collector):
    def __init__(self, previews: PreviewFacts) -> None:
        self._previews = previews

    def collect(self) -> Iterable[Metric]:
        failed = GaugeMetricFamily("coffer_previews_failed", "Files whose preview failed, until it is tried again.", labels=("type",))
        for kind in sorted(PREVIEWED):
            failed.add_metric((kind,), self._previews.failed.get(kind, 0))
        seconds = HistogramMetricFamily(
            "coffer_preview_duration_seconds",
            "Time that making a file's previews took, without waiting for its turn, by what became of them.",
            labels=("type", "state"),
        )
        for labels, counted in sorted(self._previews.made.items()):
            upto = itertools.accumulate(files for _, files, _ in counted)
            buckets = [("+Inf" if bound == math.inf else str(bound), files) for (bound, _, _), files in zip(counted, upto, strict=True)]
            seconds.add_metric(labels, buckets, sum(each for _, _, each in counted))
        return (GaugeMetricFamily("coffer_previews_waiting", "Files that wait for their preview.", self._previews.waiting), failed, seconds)


class _Backups(Collector):
    def __init__(self, backups: BackupState) -> None:
        self._backups = backups

    def collect(self) -> Iterable[Metric]:
        now = self._backups
        if now.last_good_at is not None:
            yield GaugeMetricFamily("coffer_backups_last_good_timestamp_seconds", "What the last whole backup shows.", now.last_good_at)
        if now.last_proof_at is not None:
            yield GaugeMetricFamily("coffer_backups_last_proof_timestamp_seconds", "When a drill last restored one.", now.last_proof_at)
        yield GaugeMetricFamily("coffer_backups_are_proven", "Whether a drill has restored one lately.", float(now.are_proven))
        yield GaugeMetricFamily(
            "coffer_uploads_are_stopped", "Whether the store was restored and waits to be cleared.", float(now.uploads_are_stopped)
        )


class _Work(Collector):
    def __init__(self, work: WorkFacts) -> None:
        self._work = work

    def collect(self) -> Iterable[Metric]:
        work = self._work
        for name, meaning, states, numbers in (
            ("generation_jobs", "Generation jobs that have not ended.", ("queued", "running"), work.open_jobs),
            ("generation_jobs_ended", "Generation jobs that ended within the last hour.", JOB_ENDS, work.ended_jobs),
            ("generation_outputs_ended", "Outputs of those, but for what was cancelled.", ("stored", "failed"), work.ended_outputs),
        ):
            by_state = GaugeMetricFamily(f"coffer_{name}", meaning, labels=("state",))
            for state in states:
                by_state.add_metric((state,), numbers.get(state, 0))
            yield by_state
        for name, meaning, value in (
            ("generation_oldest_queued_seconds", "For how long the oldest job has waited for its pipeline.", work.oldest_queued_seconds),
            ("generation_outputs_fetching", "Outputs that wait to be fetched, or are being fetched.", work.fetching_outputs),
            ("webhook_pending", "Events that endpoints have not been told yet.", work.pending_deliveries),
            ("webhook_dead_letters", "Events that were given up.", work.dead_letters),
            ("webhook_oldest_pending_seconds", "For how long the oldest event has not been told.", work.oldest_delivery_seconds),
        ):
            yield GaugeMetricFamily(f"coffer_{name}", meaning, value)
        told = CounterMetricFamily("coffer_webhook_deliveries", "Events that were sent, by what became of that.", labels=("result",))
        fetched = CounterMetricFamily("coffer_fetches", "Fetches from elsewhere, by what became of them.", labels=("purpose", "result"))
        for (purpose, result), count in sorted(work.counts.items()):
            if purpose == "delivery":
                told.add_metric((result,), count)
            else:
                fetched.add_metric((purpose, result), count)
        yield from (told, fetched)


class _Store(Collector):
    def __init__(self, store: StoreFacts | None) -> None:
        self._store = store

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("coffer_database_up", "Whether the database answered this scrape.", float(self._store is not None))
        if self._store is None:
            return
        store = self._store
        for name, meaning, value in (
            ("users", "Users that have storage.", store.users),
            ("users_unlimited", "Users whose storage has no limit.", store.unlimited_users),
            ("stored_files", "Files of all users.", store.files),
            ("stored_bytes", "Bytes of all users' files.", store.stored_bytes),
            ("reserved_bytes", "Bytes of quota that uploads under way hold.", store.reserved_bytes),
            ("quota_bytes", "Sum of all quotas, without those that are unlimited.", store.quota_bytes),
            ("damaged_files", "Files whose stored bytes are known to be gone or wrong.", store.damaged_files),
            (
                "reservation_overdue_seconds",
                "For how long the reservation that ended first should have been released.",
                store.reservation_overdue_seconds,
            ),
            ("tombstone_age_seconds", "For how long the oldest deleted file has waited to leave the disk.", store.tombstone_age_seconds),
            ("worker_connections", "Connections of workers to the database; none: no worker is at work.", store.worker_connections),
        ):
            yield GaugeMetricFamily(f"coffer_{name}", meaning, value)
        warned = GaugeMetricFamily(
            "coffer_users_warned", "Users by the percentage of their quota that they were last warned of.", labels=("percent",)
        )
        for percent, count in store.warned_users.items():
            warned.add_metric((str(percent),), count)
        yield warned


@contextmanager
def shared_by_processes() -> Iterator[None]:
    """Within it, processes that are started share their metrics. For the parent of several serving processes."""
    with tempfile.TemporaryDirectory(prefix="coffer-metrics-") as directory:
        os.environ[_DIRECTORY_VARIABLE] = directory
        try:
            yield
        finally:
            del os.environ[_DIRECTORY_VARIABLE]


def _forget_dead_processes(directory: Path) -> None:
    for file in directory.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid, str(directory))  # type: ignore[no-untyped-call]
        except PermissionError:
            pass  # alive, under another user
