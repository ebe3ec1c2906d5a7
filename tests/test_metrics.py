"""The metrics endpoint, asked over HTTP, about real run folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.metrics import RunCollector, WatchCollector, endpoint, open_runs
from tasks.core.errors import SettingsError
from tasks.launch import launch
from tasks.watch import STATE
from tests.making import write_pod5
from tests.servers import free_port, http_get
from tests.test_pipeline import call, run, settings
from tests.test_watch import NOW, Site


def asked(port: int) -> dict[tuple[str, ...], float]:
    """Ask the endpoint: {(name, values of its labels …): value}."""
    text = http_get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            found[(one.name, *(Path(value).name for _, value in sorted(one.labels.items())))] = one.value
    return found


def test_a_run(tmp_path: Path) -> None:
    write_pod5(tmp_path / "data" / "a.pod5", [20_000, 5, 30_000])
    merged = run(settings(tmp_path / "data", out=tmp_path / "out"))
    port = free_port()
    with endpoint(port, RunCollector(lambda: [tmp_path / "out", tmp_path / "not there"])):
        for _ in range(2):
            found = asked(port)
    assert found["shoal_reads_planned", "out"] == 3
    assert found["shoal_reads", "called", "out"] == 2
    assert found["shoal_reads", "skipped", "out"] == 1
    assert found["shoal_bases", "out"] == merged.bases
    assert found["shoal_batches_done", "out"] == found["shoal_batches_planned", "out"] == 1
    assert found["shoal_slots_at_work", "out"] == found["shoal_bundles_failed", "out"] == 0
    assert 0 < found["shoal_busy_fraction", "out"] < 1


def test_a_run_that_grows(tmp_path: Path) -> None:
    write_pod5(tmp_path / "data" / "a.pod5", [20_000, 5, 30_000])
    given = settings(tmp_path / "data", out=tmp_path / "out")
    run(given)
    port = free_port()
    with endpoint(port, RunCollector(lambda: [given.out])):
        assert asked(port)["shoal_batches_planned", "out"] == 1
        write_pod5(tmp_path / "data" / "b.pod5", [20_000] * 4, first=3)
        launch(given)
        found = asked(port)
        assert (found["shoal_reads_planned", "out"], found["shoal_samples_planned", "out"]) == (7, 130_005)
        assert (found["shoal_batches_done", "out"], found["shoal_batches_planned", "out"]) == (1, 2)
        call(given, only=slice(1, None))
        found = asked(port)
        assert found["shoal_batches_done", "out"] == 2
        assert found["shoal_reads", "called", "out"] == 6
        assert found["shoal_samples_done", "out"] == 130_005


def test_a_watch(tmp_path: Path) -> None:
    site = Site(tmp_path)
    port = free_port()
    with endpoint(port, WatchCollector(site.out)):
        assert asked(port)["shoal_watch_runs", "call"] == 0
        site.write("run/a.pod5", at=NOW)
        site.write("run/b.pod5", at=NOW, first=3).write_bytes(b"no POD5")
        site.look(NOW + 100)
        found = asked(port)
    assert found["shoal_watch_runs", "call"] == 1
    assert found["shoal_watch_look_timestamp_seconds",] == NOW + 100
    assert open_runs(site.out) == [site.out / "run"]
    assert (site.out / STATE / "look.json").exists()


def test_a_port_that_is_taken() -> None:
    port = free_port()
    with endpoint(port), pytest.raises(SettingsError, match=f"metrics port {port} .* in use; .*--metrics-port"):
        endpoint(port).__enter__()
