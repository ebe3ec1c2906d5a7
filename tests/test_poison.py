"""A read that breaks whatever calls it costs itself, and nothing else."""

from __future__ import annotations

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
from tasks.formats.workspace import Workspace
from tasks.launch import launch
from tasks.merge import merge
from tasks.settings import RunSettings
from tasks.split import basecall_bundle
from tests.fakes import PoisonedEngine, open_poisoned
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
def split(given: RunSettings, artifact: UUID) -> None:
    cluster = opened_cluster()
    assert cluster is not None
    call_in_rounds(given, cluster, SITE, artifact)


@flow(name="poisoned", validate_parameters=False)
def calling(given: RunSettings, how: str) -> None:
    artifact = create_progress_artifact(0.0, key="progress")
    logs = Workspace(given.out).logs
    with open_cluster(SITE, partial(open_poisoned, POISON, how), slots=1, logs=logs, log_level="INFO") as cluster:
        split.with_options(task_runner=task_runner(cluster))(given, artifact)


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
    calling(given, how)
    check(given)


def test_an_engine_that_always_breaks_is_given_up(tmp_path: Path) -> None:
    given = prepared(tmp_path, 90)

    class Broken(PoisonedEngine):
        def _checked(self, reads):  # type: ignore[no-untyped-def]
            raise EngineError("no GPU")

    with pytest.raises(EngineError, match="no GPU"):
        attempt(given, Broken(POISON, how="raises"))
    assert not committed_ids(Workspace(given.out))
