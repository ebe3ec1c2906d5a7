"""A read that breaks whatever calls it costs itself; a worker that breaks over every read, nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from uuid import UUID

import polars as pl
import pytest
from prefect import flow
from prefect.artifacts import create_progress_artifact

from flows.rounds import call_in_rounds
from infra.cluster import open_cluster, opened_cluster, task_runner
from infra.site import Site
from tasks.core.batches import Bundle
from tasks.core.errors import EngineError
from tasks.engines.base import Engine
from tasks.formats.commit import committed_ids
from tasks.formats.planfile import read_plan
from tasks.formats.workspace import Workspace, read_json
from tasks.launch import launch
from tasks.merge import merge
from tasks.report import result_markdown
from tasks.settings import RunSettings
from tasks.split import basecall_bundle
from tests.fakes import BrokenEngine, PoisonedEngine, open_first_broken, open_poisoned
from tests.making import read_uuid, write_pod5
from tests.test_pipeline import check_from_outside, settings

ROOT = Path(__file__).parents[1]
SITE = Site(name="test", workers=1, late_after=1, stall_after=2)
POISON = str(read_uuid(1, 1))


def prepared(folder: Path, reads: int) -> RunSettings:
    """Plan a run of one batch, in which POISON is the second read."""
    write_pod5(folder / "in" / "a.pod5", [500] * reads, seed=1)
    given = settings(folder / "in", out=folder / "out", rounds=1)
    launch(given)
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
    with open_cluster(site, opener, slots=1, logs=logs, log_level="INFO") as cluster:
        split.with_options(task_runner=task_runner(cluster))(given, artifact, site)


def check(given: RunSettings) -> None:
    """All called but the poison, which the ledger names with its signal's place."""
    merged = merge(given)
    assert (merged.called, merged.quarantined) == (merged.reads - 1, 1)
    ledger = pl.read_parquet(given.out / "ledger.parquet").filter(pl.col("fate") == "quarantined")
    assert ledger["read_id"].to_list() == [POISON]
    assert "a.pod5, row 1" in ledger["reason"][0]
    check_from_outside(given.out, *given.input)


def test_a_read_that_breaks_the_engine_is_found_and_the_rest_lands(tmp_path: Path) -> None:
    given = prepared(tmp_path, 90)
    for _ in range(20):
        try:
            attempt(given, PoisonedEngine(POISON, how="raises"))
        except EngineError:
            continue
        break
    check(given)


@pytest.mark.parametrize("how", ["kills", "hangs"])
def test_a_read_that_ends_its_worker_is_found_and_the_rest_lands(
    how: str, tmp_path: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = prepared(tmp_path, 2)
    monkeypatch.syspath_prepend(str(ROOT))
    Workspace(given.out).create()
    calling(given, partial(open_poisoned, POISON, how), SITE)
    check(given)


def test_an_engine_that_always_breaks_is_given_up(tmp_path: Path) -> None:
    given = prepared(tmp_path, 90)
    with pytest.raises(EngineError, match="no GPU"):
        attempt(given, BrokenEngine(POISON, how="raises"))
    assert not committed_ids(Workspace(given.out))


def test_a_worker_that_can_call_nothing_is_set_aside_and_named(
    tmp_path: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pod5(tmp_path / "in" / "a.pod5", [100_000] * 12, seed=1)
    given = settings(tmp_path / "in", out=tmp_path / "out", batch_samples=100_000, bundle_samples=100_000)
    launch(given)
    monkeypatch.syspath_prepend(str(ROOT))
    Workspace(given.out).create()
    calling(given, partial(open_first_broken, tmp_path / "broken"), SITE.model_copy(update={"workers": 2}))
    merged = merge(given)
    assert (merged.called, merged.quarantined) == (12, 0)
    check_from_outside(given.out, *given.input)
    (aside,) = read_json(Workspace(given.out).aside)
    assert "bundles in a row failed" in aside
    assert "EngineError: no GPU" in aside
    assert aside in result_markdown(merged)
