"""Figures of runs for Prometheus, read off their folders each time that it asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from infra.workers import read_heartbeats
from tasks.core.errors import SettingsError
from tasks.formats.workspace import Workspace, read_crew, read_json
from tasks.progress import RunProgress, Watch
from tasks.watch import STATE

#: Name, help, and the figure of each gauge of a run.
GAUGES: tuple[tuple[str, str, Callable[[RunProgress], float]], ...] = (
    ("shoal_reads_planned", "Reads of the plan", lambda p: p.reads),
    ("shoal_samples_planned", "Samples of the plan", lambda p: p.samples),
    ("shoal_samples_done", "Samples called and committed", lambda p: p.samples_done),
    ("shoal_batches_planned", "Batches of the plan", lambda p: p.batches),
    ("shoal_batches_done", "Batches committed", lambda p: p.batches_done),
    ("shoal_bases", "Bases called", lambda p: p.bases),
    ("shoal_busy_fraction", "Share of the slots' time that went to the engine", lambda p: p.busy),
    ("shoal_samples_per_second", "Mean rate while batches were called", lambda p: p.samples_per_second),
)


class RunCollector(Collector):
    """Figures of the runs that are worked on now."""

    def __init__(self, outs: Callable[[], Iterable[Path]]) -> None:
        self._outs = outs
        self._watches: dict[Path, Watch] = {}
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        with self._lock:  # Prometheus may ask twice at once
            found = {out: watch for out in self._outs() if (watch := self._watches.get(out) or Watch(Workspace(out)))}
            self._watches = found
            seen = [(out, progress) for out, watch in found.items() if (progress := watch.look())]
        for name, text, figure in GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=("run",))
            for out, progress in seen:
                gauge.add_metric((str(out),), figure(progress))
            yield gauge
        fates = GaugeMetricFamily("shoal_reads", "Reads by fate", labels=("run", "fate"))
        slots = GaugeMetricFamily("shoal_slots_at_work", "Slots of workers that call", labels=("run",))
        silence = GaugeMetricFamily("shoal_heartbeat_age_seconds", "Age of the oldest heartbeat", labels=("run",))
        failures = GaugeMetricFamily(
            "shoal_bundles_failed", "Bundles that failed on a worker, in this flow", labels=("run",)
        )
        aside = GaugeMetricFamily("shoal_workers_set_aside", "Workers that get no more bundles", labels=("run",))
        now = time.time()
        for out, progress in seen:
            for fate in ("called", "skipped", "quarantined"):
                fates.add_metric((str(out), fate), getattr(progress, fate))
            beats = list(read_heartbeats(Workspace(out).heartbeats))
            slots.add_metric((str(out),), len(beats))
            silence.add_metric((str(out),), max((now - beat.time for beat in beats), default=0.0))
            failed, set_aside = read_crew(Workspace(out))
            failures.add_metric((str(out),), failed)
            aside.add_metric((str(out),), len(set_aside))
        yield from (fates, slots, silence, failures, aside)


class WatchCollector(Collector):
    """What the last look of a watch saw."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def collect(self) -> Iterator[Metric]:
        seen = read_json(self._out / STATE / "look.json") or {"runs": [], "problems": 0, "time": 0.0}
        runs = GaugeMetricFamily("shoal_watch_runs", "Runs by what the last look did", labels=("action",))
        for action in ("wait", "call", "close", "closed", "refused"):
            runs.add_metric((action,), sum(run["action"] == action for run in seen["runs"]))
        problems = GaugeMetricFamily("shoal_watch_problems", "Files, folders and runs that can't be used")
        problems.add_metric((), seen["problems"])
        looked = GaugeMetricFamily("shoal_watch_look_timestamp_seconds", "When the last look was")
        looked.add_metric((), seen["time"])
        yield from (runs, problems, looked)


def open_runs(out: Path) -> list[Path]:
    """List the output folders of a watch's runs that are not closed."""
    seen = read_json(out / STATE / "look.json") or {"runs": []}
    return [Path(run["out"]) for run in seen["runs"] if run["action"] in ("wait", "call")]


@contextmanager
def endpoint(port: int | None, *collectors: Collector, host: str = "127.0.0.1") -> Iterator[None]:
    """Serve metrics on /metrics while the block runs; on no port, nothing.

    Raises:
        SettingsError: the port can't be listened on.
    """
    if port is None:
        yield
        return
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise SettingsError(
            f"metrics port {port} can't be listened on: {error.strerror}; give another with --metrics-port"
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
