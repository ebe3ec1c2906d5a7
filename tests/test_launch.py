"""Launch beside others: who only looks at a plan leaves it to the flow that writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core.errors import SettingsError
from tasks.formats.workspace import Workspace
from tasks.launch import launch, plan_input
from tests.making import write_pod5
from tests.test_pipeline import call, settings


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


@pytest.mark.parametrize(
    ("setting", "name", "content", "says"),
    [
        ("sample_sheet", "sheet.csv", "flow_cell_id,barcode,alias\nF,barcode1,a\n", "sheet.csv:2: barcode 'barcode1'"),
        ("reference", "reference.fa", "no FASTA\n", "reference.fa can't be read as FASTA"),
    ],
)
def test_files_that_workers_could_not_read_are_refused_at_once(
    tmp_path: Path, setting: str, name: str, content: str, says: str
) -> None:
    write_pod5(tmp_path / "data" / "one.pod5", [20_000])
    (tmp_path / name).write_text(content)
    output = {"formats": "bam,cram" if setting == "reference" else "bam", setting: tmp_path / name}
    given = settings(tmp_path / "data", out=tmp_path / "out", output=output)
    for begin in (plan_input, launch):
        with pytest.raises(SettingsError, match=f"{tmp_path}/{says}"):
            begin(given)
    assert not given.out.exists()


def test_a_reference_that_nobody_aligns_to_is_refused(tmp_path: Path) -> None:
    write_pod5(tmp_path / "data" / "one.pod5", [20_000])
    (tmp_path / "reference.fa").write_text(">chr1\nACGT\n")
    output = {"formats": "bam", "reference": tmp_path / "reference.fa"}
    with pytest.raises(SettingsError, match=r"output\.reference: the null engine aligns to none"):
        plan_input(settings(tmp_path / "data", out=tmp_path / "out", output=output))


def test_a_sample_sheet_binds_once_something_is_called_by_it(tmp_path: Path) -> None:
    write_pod5(tmp_path / "data" / "one.pod5", [20_000])
    sheet, kept = tmp_path / "sheet.csv", Workspace(tmp_path / "out").sample_sheet
    sheet.touch()
    given = settings(tmp_path / "data", out=tmp_path / "out", output={"sample_sheet": sheet})
    for alias in ("one", "two"):
        sheet.write_text(f"flow_cell_id,barcode,alias\nFAX12345,barcode01,{alias}\n")
        launch(given)
        assert kept.read_bytes() == sheet.read_bytes()
    call(given)
    sheet.write_text(sheet.read_text().replace("two", "three"))
    with pytest.raises(SettingsError, match=r"sheet\.csv is not what it was"):
        launch(given)
