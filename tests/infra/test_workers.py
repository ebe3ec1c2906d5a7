"""The plugin that holds an engine, and heartbeats; neither needs a cluster."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import pytest

from infra.workers import EnginePlugin, Heartbeat, clear_heartbeats, heartbeat, read_heartbeats, worker_engine
from tasks.core.errors import EngineError, ShoalError
from tests.fakes import open_broken, open_fake
from tests.slurm import wait_for


def test_the_plugin_opens_and_closes_the_engine(tmp_path: Path) -> None:
    plugin = pickle.loads(pickle.dumps(EnginePlugin(partial(open_fake, tmp_path))))
    assert not list(tmp_path.iterdir())
    plugin.setup(None)
    assert plugin.engine.identity.engine == "fake"
    plugin.teardown(None)
    assert sorted(file.name.split("-")[0] for file in tmp_path.iterdir()) == ["closed", "opened"]


def test_an_engine_that_does_not_open_is_told_to_those_who_ask() -> None:
    plugin = EnginePlugin(open_broken)
    plugin.setup(None)
    with pytest.raises(EngineError, match="no GPU answers on device 3"):
        _ = plugin.engine
    plugin.teardown(None)


def test_there_is_no_engine_outside_a_worker() -> None:
    with pytest.raises(ShoalError, match="open_cluster"):
        worker_engine()


def test_a_beat_is_a_file(tmp_path: Path) -> None:
    beat = heartbeat(tmp_path, bundle=7)
    (first,) = read_heartbeats(tmp_path)
    assert (first.bundle, first.batch_id, first.reads) == (7, "", 0)
    beat.beat(batch_id="abc", reads=3, samples=4000)
    wait_for(lambda: [read.reads for read in read_heartbeats(tmp_path)] == [3])
    (read,) = read_heartbeats(tmp_path)
    assert (read.batch_id, read.samples, read.attempt) == ("abc", 4000, first.attempt)
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]  # replaced, nothing is left beside it
    beat.end()
    beat.end()
    assert not list(read_heartbeats(tmp_path))


def test_a_slot_beats_while_its_engine_hangs(tmp_path: Path) -> None:
    beat = Heartbeat(tmp_path, "worker")
    (first,) = read_heartbeats(tmp_path)
    wait_for(lambda: next(read_heartbeats(tmp_path)).time > first.time)
    assert next(read_heartbeats(tmp_path)).reads == 0
    beat.end()


def test_beats_of_a_worker_that_is_gone_are_taken_away(tmp_path: Path) -> None:
    beats = [Heartbeat(tmp_path, name) for name in ("h100-1", "h100-1", "h100-11")]
    clear_heartbeats(tmp_path, "h100-1")
    assert [beat.worker for beat in read_heartbeats(tmp_path)] == ["h100-11"]
    for beat in beats:
        beat.end()


def test_no_beats_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert not list(read_heartbeats(tmp_path / "none"))
