"""Merge: what it writes, what it leaves alone, and when it says that a result is whole."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import polars as pl
import pytest

from deployments.cli import _done
from deployments.display import Display
from tasks.core.errors import SettingsError
from tasks.formats.resort import Choice, choose
from tasks.formats.tree import names_written
from tasks.formats.workspace import Workspace
from tasks.launch import launch, plan_input
from tasks.merge import merge, merged_before
from tasks.verify import verify
from tests.making import write_pod5
from tests.test_crash import die
from tests.test_outputs import data as data
from tests.test_outputs import run as rich_run
from tests.test_pipeline import call, check_from_outside, run, settings

#: MinKNOW's folder of the run that write_pod5 makes.
HOME = Path("experiment", "sample", "20261122_0830_1A_FAX12345_00000000")


@pytest.fixture
def minknow(tmp_path: Path) -> Path:
    """A data folder of MinKNOW's."""
    write_pod5(tmp_path / "data" / HOME / "pod5" / "one.pod5", [20_000] * 12, seed=1)
    return tmp_path / "data"


def theirs(data: Path, *names: str) -> list[Path]:
    """Write files as MinKNOW's own basecalling does."""
    paths = [data / HOME / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("MinKNOW's own")
    return paths


@pytest.mark.parametrize(
    "name",
    [
        "fastq_pass/FAX12345_pass_00000000_00000000_0.fastq.gz",
        "fastq_fail/barcode01/FAX12345_fail_barcode01_00000000_00000000_0.fastq",
        "bam_pass/FAX12345_pass_00000000_00000000_0.bam",
        "sequencing_summary_FAX12345_00000000_00000000.txt",
        "final_summary_FAX12345_00000000_00000000.txt",
    ],
)
def test_calls_of_minknows_are_never_touched(minknow: Path, name: str) -> None:
    (path,) = theirs(minknow, name)
    given = settings(minknow, out=minknow)
    for begin in (plan_input, launch):
        with pytest.raises(SettingsError, match=f"{path.name}; they are left as they are: give another output folder"):
            begin(given)
    assert path.read_text() == "MinKNOW's own"
    assert not (minknow / ".shoal" / "plan").exists()


def test_calls_that_come_while_we_call_are_not_touched_either(minknow: Path) -> None:
    given = settings(minknow, out=minknow)
    launch(given)
    call(given)
    (path,) = theirs(minknow, "fastq_pass/FAX12345_pass_00000000_00000000_0.fastq.gz")
    with pytest.raises(SettingsError, match="move them away"):
        merge(given)
    path.rename(minknow / path.name)
    merge(given)
    check_from_outside(minknow, minknow)


def test_merging_again_removes_what_merge_wrote_and_nothing_else(minknow: Path) -> None:
    given = settings(minknow, out=minknow, output={"formats": "fastq,bam"})
    run(given)
    notes = theirs(minknow, "fastq_pass/notes.txt", "bam_pass/one.bam.bai", "report_FAX12345.html", "pod5/a.fastq.gz")
    workspace = Workspace(minknow)
    choose(workspace, Choice(min_qscore=60))
    assert merge(given).passed == 0
    merge(settings(minknow, out=minknow, output={"formats": "bam,sam", "files": "one"}))
    assert [path.read_text() for path in notes] == ["MinKNOW's own"] * 4
    found = {str(path.relative_to(minknow)) for path in (minknow / HOME).rglob("*") if path.is_file()}
    others = {str(path.relative_to(minknow)) for path in (*notes, minknow / HOME / "pod5" / "one.pod5")}
    assert found - others == names_written(workspace)
    assert not verify(workspace).faults


@pytest.mark.parametrize("at", [3, 6, 9, 14, 20, 26])
def test_what_a_killed_merge_left_is_ours(minknow: Path, at: int) -> None:
    """Killed over an earlier result, before and after it wrote names down; then merged with names of other files."""
    given = settings(minknow, out=minknow, output={"formats": "bam"})
    run(given)
    assert die("merge", at, settings(minknow, out=minknow, output={"formats": "sam", "files": "one"}))
    plan_input(given)
    merge(given)
    assert not verify(Workspace(minknow)).faults
    hidden = [path.name for path in (minknow / HOME).rglob(".*") if path.suffix != ".new"]
    assert not hidden


@pytest.mark.parametrize("came", ["wrong chemistry", "truncated", "grown"])
def test_a_result_is_of_the_whole_plan_or_not_complete(tmp_path: Path, came: str) -> None:
    """Input came of which no batch is made, and the flow died between launch and merge."""
    data, workspace = tmp_path / "data", Workspace(tmp_path / "out")
    write_pod5(data / "one.pod5", [3_000] * 3, seed=1, sample_rate=5000)
    (data / "cut.pod5").write_bytes(b"\x8bPOD\r\n\x1a\n")
    given = settings(data, out=workspace.out, engine="cpu")
    merged = run(given)
    display = Display(json=True)
    assert merged_before(workspace) == _done(given, display) == merged
    if came == "wrong chemistry":
        write_pod5(data / "two.pod5", [3_000] * 2, seed=2, sequencing_kit="sqk-rna004")
    else:
        name = "another.pod5" if came == "truncated" else "cut.pod5"
        (data / name).write_bytes(b"\x8bPOD\r\n\x1a\n and more")
    assert _done(given, display) is None
    assert not launch(given).left
    assert merged_before(workspace) is None
    assert _done(given, display) is None
    again = merge(given)
    assert (again.reads, again.files) == {"wrong chemistry": (5, 3), "truncated": (3, 3), "grown": (3, 2)}[came]
    assert merged_before(workspace) == _done(given, display) == again
    assert pl.read_parquet(workspace.input_files).height == again.files


@pytest.mark.parametrize("output", [{"files": "one"}, {"summary": "dorado-1.4"}, {"formats": "bam,sam"}])
def test_a_complete_run_with_other_files_or_columns_is_merged_again(
    minknow: Path, tmp_path: Path, output: dict[str, str]
) -> None:
    first = settings(minknow, out=tmp_path / "out", output={"formats": "bam"})
    given = settings(minknow, out=tmp_path / "out", output={"formats": "bam", **output})
    display = Display(json=True)
    run(first)
    assert _done(first, display)
    assert _done(given, display) is None
    assert not launch(given).left
    merge(given)
    assert _done(given, display)


def test_a_reference_that_cram_cannot_use_is_refused_before_anything_is_done(minknow: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference.fa.gz"
    reference.write_bytes(gzip.compress(b">chr1\nACGT\n"))
    cram = {"formats": "cram", "reference": reference}
    with pytest.raises(SettingsError, match=r"reference\.fa\.gz is packed by gzip"):
        plan_input(settings(minknow, out=tmp_path / "out", output=cram))
    merged = run(settings(minknow, out=tmp_path / "out", output={"formats": "bam"}))
    with pytest.raises(SettingsError, match=r"reference\.fa\.gz is packed by gzip"):
        merge(settings(minknow, out=tmp_path / "out", output=cram))
    assert merged_before(Workspace(tmp_path / "out")) == merged


@pytest.mark.parametrize("name", ["provenance.json", ".shoal/merged.json"])
def test_a_result_whose_account_is_cut_is_merged_again(minknow: Path, tmp_path: Path, name: str) -> None:
    given = settings(minknow, out=tmp_path / "out")
    run(given)
    path = given.out / name
    path.write_bytes(path.read_bytes()[:-5])
    assert _done(given, Display(json=True)) is None
    merge(given)
    assert _done(given, Display(json=True))


def test_a_plan_of_an_older_version_has_a_digest_too(minknow: Path, tmp_path: Path) -> None:
    given = settings(minknow, out=tmp_path / "out")
    merged = run(given)
    workspace = Workspace(given.out)
    (workspace.plan / "digest.json").unlink()
    assert merged_before(workspace) == merged


@pytest.mark.parametrize("files", ["many", "one"])
def test_all_is_on_disk_before_the_result_is_called_whole(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: str
) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    output = {"formats": "fastq,bam,sam", "barcoding_summary": True, "files": files}
    given = rich_run(settings(data, out=tmp_path / "out", output=output))
    workspace = Workspace(given.out)
    for _ in range(2):  # as it was called, and sorted again
        last = synced[::-1].index(workspace.merged.stat().st_ino)  # a file that is gone may have had its number before
        before = set(synced[: len(synced) - 1 - last])
        made = [given.out, *given.out.rglob("*")]
        lying = [path for path in made if path != workspace.state and workspace.state not in path.parents]
        lying += [path for path in workspace.sorted.rglob("*") if path.name != "choice.json"]
        assert [path for path in lying if path.stat().st_ino not in before] == []
        assert len(lying) > 10
        synced.clear()
        choose(workspace, Choice(min_qscore=10))
        merge(given)
