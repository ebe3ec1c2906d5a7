"""A read that breaks whatever calls it costs itself; a worker that breaks over every read, nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import UUID

import polars as pl
import pytest
from prefect import flow
from prefect.artifacts import create_progress_artifact

from flows.rounds import _Crew, call_in_rounds
from infra.cluster import open_cluster, opened_cluster, task_runner
from infra.site import Site, SplitResources
from tasks.core.batches import Bundle
from tasks.core.crew import Ended
from tasks.core.errors import EngineError
from tasks.engines.base import Engine
from tasks.formats.commit import committed_ids
from tasks.formats.planfile import read_plan
from tasks.formats.workspace import Workspace, read_crew
from tasks.launch import launch
from tasks.merge import merge
from tasks.report import result_markdown
from tasks.settings import RunSettings
from tasks.split import basecall_bundle
from tests.fakes import BrokenEngine, PoisonedEngine, open_first_broken, open_poisoned
from tests.making import read_uuid, write_pod5
from tests.test_pipeline import check_from_outside, settings

ROOT = Path(__file__).parents[1]
SITE = Site(name="test", workers=2)
SLURM_SITE = Site(
    name="test",
    kind="slurm",
    interface="lo",
    late_after=1,
    stall_after=10,
    split=SplitResources(partition="h100", gres="gpu:H100:1", memory_per_thread_gb=1, maximum=2, minimum=2),
)
POISON = str(read_uuid(1, 1))


def prepared(folder: Path, *files: int, **more: object) -> RunSettings:
    """Plan a run of a batch for each file of so many reads."""
    for number, reads in enumerate(files):
        write_pod5(folder / "in" / f"{number}.pod5", [100_000 // reads] * reads, seed=1, first=10 * number)
    given = settings(folder / "in", out=folder / "out", batch_samples=100_000, bundle_samples=100_000, **more)
    launch(given)
    Workspace(given.out).create()
    return given


def attempt(given: RunSettings, engine: Engine) -> None:
    workspace = Workspace(given.out)
    plan = read_plan(workspace)
    basecall_bundle(
        workspace,
        Bundle(number=0, batches=plan.batches),
        engine,
        given.output,
        min_qscore=0,
        run_numbers={run.info.key: i for i, run in enumerate(plan.runs)},
        carefully=True,
    )


@flow(name="poisoned split", validate_parameters=False)
def split(given: RunSettings, artifact: UUID, site: Site) -> None:
    cluster = opened_cluster()
    assert cluster is not None
    call_in_rounds(given, cluster, site, artifact)


@flow(name="poisoned", validate_parameters=False)
def calling(given: RunSettings, opener: Callable[[], Engine], site: Site) -> None:
    artifact = create_progress_artifact(0.0, key="progress")
    logs = Workspace(given.out).logs
    with open_cluster(site, opener, slots=1, logs=logs, log_level="INFO", run_id="poison") as cluster:
        split.with_options(task_runner=task_runner(cluster))(given, artifact, site)


def check(given: RunSettings, poison: dict[str, str]) -> None:
    """All called but the poison, which the ledger names with its signal's place."""
    merged = merge(given)
    assert (merged.called, merged.quarantined) == (merged.reads - len(poison), len(poison))
    ledger = pl.read_parquet(given.out / "ledger.parquet").filter(pl.col("fate") == "quarantined")
    assert (
        dict(ledger.select("read_id", pl.col("reason").str.extract(r"([^/]*\.pod5, row \d+)$")).iter_rows()) == poison
    )
    check_from_outside(given.out, *given.input)


def test_a_read_that_breaks_the_engine_is_found_and_the_rest_lands(tmp_path: Path) -> None:
    given = prepared(tmp_path, 90)
    for _ in range(20):
        try:
            attempt(given, PoisonedEngine({POISON: "raises"}))
        except EngineError:
            continue
        break
    check(given, {POISON: "0.pod5, row 1"})


@pytest.mark.slurm
def test_reads_that_end_their_workers_are_found_and_the_rest_lands(
    tmp_path: Path, prefect_url: str, slurm_here: None
) -> None:
    """One kills the process of whoever calls it, one hangs it."""
    given = prepared(tmp_path, 2, 2, 5, rounds=1)
    hanging = str(read_uuid(1, 10))
    calling(given, partial(open_poisoned, {POISON: "kills", hanging: "hangs"}), SLURM_SITE)
    check(given, {POISON: "0.pod5, row 1", hanging: "1.pod5, row 0"})


def test_an_engine_that_always_breaks_is_given_up(tmp_path: Path) -> None:
    given = prepared(tmp_path, 90)
    with pytest.raises(EngineError, match="no GPU"):
        attempt(given, BrokenEngine({}))
    assert not committed_ids(Workspace(given.out))


def test_a_worker_that_can_call_nothing_is_set_aside_and_named(
    tmp_path: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = prepared(tmp_path, *[1] * 12)
    monkeypatch.syspath_prepend(str(ROOT))
    calling(given, partial(open_first_broken, tmp_path / "broken"), SITE)
    merged = merge(given)
    assert (merged.called, merged.quarantined) == (12, 0)
    check_from_outside(given.out, *given.input)
    failures, (aside,) = read_crew(Workspace(given.out))
    assert failures >= 3
    assert "bundles in a row failed" in aside
    assert "EngineError: no GPU" in aside
    assert aside in result_markdown(merged)


class _Places:
    """Workers that can be set aside, and have jobs."""

    def __init__(self) -> None:
        self.jobs: set[str] = set()
        self.aside: list[str] = []

    def set_aside(self, worker: str) -> None:
        self.aside.append(worker)

    def keeps(self, worker: str) -> bool:
        return worker in self.jobs


def test_another_is_set_aside_once_the_one_before_it_has_lost_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.rounds.get_run_logger", logging.getLogger)
    monkeypatch.setattr("flows.rounds.tell", lambda *_: None)
    workspace, places = Workspace(tmp_path), _Places()
    workspace.create()
    crew = _Crew(workspace, places, most_workers=2)
    crew._note(Ended(worker="good"))
    places.jobs = {"good", "bad", "worse"}
    for name in ("bad", "worse"):
        for batch in range(3):
            crew._note(Ended(worker=name, failed=frozenset({f"{name} {batch}"})))
    assert places.aside == ["bad"]
    places.jobs.remove("bad")
    crew._note(Ended(worker="good"))
    assert places.aside == ["bad", "worse"]
