"""Commit beside clearing up: a batch is committed whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.formats.commit import clear_staging, commit, committed_ids, staging
from tasks.formats.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path)
    made.create()
    return made


def test_what_killed_workers_left_is_removed(workspace: Workspace) -> None:
    for name in ("batch.attempt", "removed.batch.other"):  # the second: a clearing that was killed, too
        (workspace.staging / name).mkdir()
        (workspace.staging / name / "fates.parquet").write_text("half")
    clear_staging(workspace)
    assert not list(workspace.staging.iterdir())


def test_a_worker_that_lives_on_commits_nothing_after(workspace: Workspace) -> None:
    with staging(workspace, "batch", "attempt") as folder:
        (folder / "fates.parquet").write_text("whole")
        with staging(workspace, "other", "attempt") as committed:
            commit(workspace, "other", committed, {})
            clear_staging(workspace)
        with pytest.raises(FileNotFoundError):
            commit(workspace, "batch", folder, {})
    assert committed_ids(workspace) == {"other"}
