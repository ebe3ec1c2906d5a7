"""Launch beside others: who only looks at a plan leaves it to the flow that writes it."""

from __future__ import annotations

from pathlib import Path

from tasks.formats.workspace import Workspace
from tasks.launch import launch, plan_input
from tests.making import write_pod5
from tests.test_pipeline import settings


def test_looking_changes_nothing_while_another_process_writes_the_plan(tmp_path: Path) -> None:
    """At the worst moment: the old plan is aside, and the new one has not its name yet."""
    write_pod5(tmp_path / "data" / "one.pod5", [20_000] * 12, seed=1)
    given = settings(tmp_path / "data", out=tmp_path / "out")
    planned = launch(given).plan
    workspace = Workspace(given.out)
    old, new = workspace.state / "plan.123.old", workspace.state / "plan.123.new"
    workspace.plan.rename(old)
    new.mkdir()
    (new / "runs.json").write_text("[]")
    write_pod5(tmp_path / "data" / "two.pod5", [20_000] * 3, seed=2)
    looked = plan_input(given)
    assert looked.plan.batches[: len(planned.batches)] == planned.batches
    assert old.exists()
    assert (new / "runs.json").exists()
    assert not workspace.plan.exists()
    assert launch(given).plan.batches == looked.plan.batches
    assert workspace.plan.exists()
    assert not old.exists()
    assert not new.exists()
