"""A run in words: artifacts and status lines, from real run folders."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.display import Display
from flows.pace import Pace, progress_words
from tasks.core.liveness import Beat
from tasks.engines.catalogue import find_model
from tasks.engines.registry import identify, quality_of
from tasks.formats.planfile import read_plan
from tasks.formats.workspace import Workspace, read_json
from tasks.progress import RunProgress
from tasks.report import plan_markdown, result_markdown
from tests.data import shared
from tests.making import damage_signal, write_pod5
from tests.test_pipeline import run, settings


def test_a_folder_named_like_a_pattern(tmp_path: Path) -> None:
    damage_signal(write_pod5(tmp_path / "data" / "a.pod5", [20_000, 30_000]), 0)
    merged = run(settings(tmp_path / "data", out=tmp_path / "calls[1]"))
    assert "2: 1 called, 0 skipped, 1 quarantined" in result_markdown(merged)


def test_plan_and_result_in_words(tmp_path: Path) -> None:
    write_pod5(tmp_path / "data" / "a.pod5", [20_000, 5, 30_000, 8_000])
    merged = run(settings(tmp_path / "data", out=tmp_path / "out"))
    plan = plan_markdown(read_plan(Workspace(tmp_path / "out")), estimated_seconds=58.4)
    assert "1 files, 4 reads, 58,005 samples in 1 batches" in plan
    assert "Estimated time: 0:00:58" in plan
    result = result_markdown(merged)
    assert "4: 3 called, 1 skipped, 0 quarantined" in result
    assert f"{merged.bases:,} bases" in result
    assert re.search(r"N50 \| [\d,]+ bases", result)
    plots = re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", result)
    assert [base64.b64decode(plot)[:4] for plot in plots] == [b"<svg", b"<svg"]


def test_the_result_says_what_may_be_expected_of_the_bundled_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(shared("data", "r10_5khz"), out=tmp_path / "out", engine="cpu")
    merged = run(given)
    model = find_model(None)
    told = f"{model.name} (cpu); {model.quality}"
    assert re.search(r"demonstration: identity 0\.\d+", told)
    assert f"| Called by | {told} |" in result_markdown(merged)
    assert read_json(Workspace(given.out).provenance)["engine"]["quality"] in told
    Display(json=False).result(merged, [])
    assert told in capsys.readouterr().out
    # What an earlier version's model called is not known by this one's.
    assert quality_of(given.engine, replace(identify(given.engine), model_digest="another")) == ""


def test_a_run_without_records(tmp_path: Path) -> None:
    write_pod5(tmp_path / "data" / "a.pod5", [5])
    result = result_markdown(run(settings(tmp_path / "data", out=tmp_path / "out")))
    assert "no records" in result
    assert "svg" not in result


def progress(samples: int) -> RunProgress:
    return RunProgress(batches=10, reads=100, samples=1_000_000, reads_done=samples // 10_000, samples_done=samples)


def test_how_fast_it_goes() -> None:
    assert "to go" not in progress_words(progress(0), since=progress(0), seconds=5)
    words = progress_words(progress(500_000), since=progress(100_000), seconds=40)
    assert words == "50 of 100 reads, 0 bases; 1 reads/s, 10k samples/s, engines 0 % busy; 0:00:50 to go"


def test_the_slowest_worker_comes_first() -> None:
    def beats(time: float, *samples: int) -> list[Beat]:
        return [
            Beat(worker=f"node{i}", process=i, batch_id="b", reads=1, samples=count, time=time)
            for i, count in enumerate(samples)
        ]

    pace = Pace()
    assert {row["samples/s"] for row in pace.rows(beats(100, 0, 0), now=100)} == {""}
    rows = pace.rows(beats(110, 50_000, 1_000), now=150)
    assert [(row["host"], row["samples/s"], row["state"]) for row in rows] == [
        ("node1", "100", "late"),
        ("node0", "5k", "late"),
    ]
