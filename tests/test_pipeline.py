"""Launch, split and merge as plain functions: no Prefect, no Dask."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from tasks.core.batches import Bundle
from tasks.core.errors import LedgerError, SettingsError
from tasks.core.result import MergedRun
from tasks.engines.base import Engine
from tasks.engines.registry import min_qscore_of, open_engine
from tasks.formats.commit import committed_ids
from tasks.formats.planfile import read_plan
from tasks.formats.workspace import Workspace, read_json, write_json
from tasks.launch import launch, with_kept_sheet
from tasks.merge import merge
from tasks.report import result_markdown
from tasks.settings import RunSettings, resolve_settings
from tasks.split import basecall_bundle
from tasks.verify import verify
from tests.data import shared
from tests.making import write_pod5


def settings(*inputs: Path, out: Path, engine: str = "null", **more: object) -> RunSettings:
    values = {"input": inputs, "out": out, "engine": {"kind": engine}, "batch_samples": 100_000, **more}
    return resolve_settings(file=None, environment={}, command_line=values)


def call(
    given: RunSettings, engine: Engine | None = None, *, only: slice = slice(None), carefully: bool = False
) -> None:
    workspace = Workspace(given.out)
    plan = read_plan(workspace)
    basecall_bundle(
        workspace,
        Bundle(number=0, batches=plan.batches[only]),
        engine or open_engine(given.engine),
        given.output,
        min_qscore=min_qscore_of(given),
        run_numbers={run.info.key: i for i, run in enumerate(plan.runs)},
        carefully=carefully,
        accept_missing=given.accept_missing,
    )


def run(given: RunSettings) -> MergedRun:
    launch(given)
    call(given)
    return merge(given)


def digests(out: Path) -> dict[str, str]:
    """Digest FASTQ and summary: what must not differ between two ways to the same result."""
    files = [*out.rglob("fastq_*/*.fastq.gz"), *out.rglob("sequencing_summary*.txt")]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_from_outside(out: Path, *inputs: Path) -> str:
    """Run the checker that shares no code with Shoal."""
    tool = shared("tools", "check_run.py")
    done = subprocess.run([sys.executable, tool, out, *inputs], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_pod5(folder / "a" / "one.pod5", [20_000] * 12, seed=1)
    write_pod5(
        folder / "b" / "two.pod5", [9_000, 5, 30_000, 250_000, 4_000], seed=2, flow_cell_id="FAX2", sample_rate=5000
    )
    return folder


def test_every_read_has_one_fate(data: Path, tmp_path: Path) -> None:
    merged = run(settings(data, out=tmp_path / "out"))
    assert (merged.reads, merged.called, merged.skipped) == (17, 16, 1)
    ledger = pl.read_parquet(tmp_path / "out" / "ledger.parquet")
    assert ledger["read_id"].n_unique() == ledger.height == 17
    assert ledger.filter(fate="skipped")["reason"].to_list() == ["too_short"]
    assert len(merged.folders) == 2
    assert not verify(Workspace(tmp_path / "out")).faults
    assert "17 reads in" in check_from_outside(tmp_path / "out", data)


def test_the_null_engine_says_so_in_names(data: Path, tmp_path: Path) -> None:
    run(settings(data, out=tmp_path / "out"))
    assert all("_null_" in name for name in digests(tmp_path / "out"))


def test_same_bytes_in_whatever_pieces(data: Path, tmp_path: Path) -> None:
    run(settings(data, out=tmp_path / "whole"))
    pieces = settings(data, out=tmp_path / "pieces")
    launch(pieces)
    call(pieces, only=slice(2, 3))
    launch(pieces)
    call(pieces, only=slice(0, 2))
    with pytest.raises(LedgerError, match="not called yet"):
        merge(pieces)
    call(pieces)
    merge(pieces)
    assert digests(tmp_path / "whole") == digests(tmp_path / "pieces")


def test_the_summary_is_the_same_however_many_batches_are_joined_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(data, out=tmp_path / "out")
    run(given)
    before = digests(given.out)
    monkeypatch.setattr("tasks.formats.summary.PARTS_AT_ONCE", 2)
    merge(given)
    assert digests(given.out) == before


def test_new_input_is_added_and_nothing_called_again(data: Path, tmp_path: Path) -> None:
    given = settings(data, out=tmp_path / "out")
    run(given)
    before = {path: path.stat().st_mtime_ns for path in Workspace(given.out).committed.iterdir()}
    write_pod5(data / "a" / "aaa.pod5", [15_000] * 3, seed=3)
    assert len(launch(given).left) == 1
    call(given)
    assert merge(given).reads == 20
    assert {path: path.stat().st_mtime_ns for path in before} == before
    check_from_outside(given.out, data)


def test_input_that_is_gone_is_refused(data: Path, tmp_path: Path) -> None:
    given = settings(data, out=tmp_path / "out")
    launch(given)
    (data / "a" / "one.pod5").unlink()
    with pytest.raises(SettingsError, match=r"12 reads .* not in the input any more"):
        launch(given)


def test_input_that_is_gone_is_quarantined_on_request(data: Path, tmp_path: Path) -> None:
    given = settings(data, out=tmp_path / "out", batch_samples=500_000)
    launch(given)
    gone, cut = data / "a" / "one.pod5", data / "b" / "two.pod5"
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-500])
    write_pod5(data / "b" / "new.pod5", [9_000], seed=3)
    with pytest.raises(SettingsError, match=r"17 reads .*--accept-missing"):
        launch(given)
    accepting = settings(data, out=tmp_path / "out", batch_samples=500_000, accept_missing=True)
    merged = run(accepting)
    assert (merged.reads, merged.called, merged.quarantined) == (18, 1, 17)
    ledger = pl.read_parquet(given.out / "ledger.parquet").filter(fate="quarantined")
    assert dict(ledger.group_by("file", "reason").len().select("file", "reason").iter_rows()) == {
        str(gone): f"missing: {gone}: no such file",
        str(cut): f"unfinished: {cut}: has no footer: it is truncated, or still being written",
    }
    files = pl.read_parquet(given.out / "input_files.parquet")
    assert dict(files.select("path", "reason").iter_rows()) == {
        str(gone): "missing",
        str(cut): "unfinished",
        str(data / "b" / "new.pod5"): "",
    }
    launch(given)
    assert merge(given).reads == 18
    assert not verify(Workspace(given.out)).faults


def test_moved_input_is_found(data: Path, tmp_path: Path) -> None:
    given = settings(data, out=tmp_path / "out")
    launch(given)
    (data / "a").rename(data / "z")
    launch(given)
    call(given)
    assert merge(given).reads == 17


def test_other_settings_on_the_same_folder_are_refused(data: Path, tmp_path: Path) -> None:
    """By naming each that differs, with both values."""
    reference = tmp_path / "reference.fasta"
    reference.write_text(">chr1\nACGT\n")
    launch(settings(data, out=tmp_path / "out"))
    output = {"formats": "fastq,bam,cram", "reference": reference, "files": "one"}
    with pytest.raises(SettingsError) as caught:
        launch(settings(data, out=tmp_path / "out", batch_samples=200_000, output=output))
    assert str(caught.value).splitlines()[1:] == [
        f"  output.reference: begun with None, given '{reference}'",
        "  output.formats: begun with 'fastq', given 'fastq,bam'",
        "  batch_samples: begun with 100000, given 200000",
    ]
    with pytest.raises(SettingsError, match=r"engine\.kind: begun with 'null', given 'cpu'"):
        launch(settings(data, out=tmp_path / "out", engine="cpu"))


def test_a_run_of_an_earlier_version_goes_on(data: Path, tmp_path: Path) -> None:
    """Its settings lack fields that have come since, and have a digest of another form."""
    sheet = tmp_path / "sheet.csv"
    sheet.write_text("flow_cell_id,barcode,alias\nFAX12345,barcode01,one\n")
    given = settings(data, out=tmp_path / "out", output={"sample_sheet": sheet})
    launch(given)
    workspace = Workspace(given.out)
    stored = read_json(workspace.settings)
    del stored["engine"]["duplex"], stored["output"]["rna_as_dna"]
    write_json(workspace.settings, {**stored, "digest": "of another form"})
    workspace.sample_sheet.unlink()
    assert run(given).reads == 17
    assert workspace.sample_sheet.read_bytes() == sheet.read_bytes()


def test_a_sample_sheet_that_is_edited_meanwhile_is_refused(data: Path, tmp_path: Path) -> None:
    sheet, copy = tmp_path / "sheet.csv", tmp_path / "copy.csv"
    sheet.write_text("flow_cell_id,barcode,alias\nFAX12345,barcode01,one\n")
    given = settings(data, out=tmp_path / "out", output={"sample_sheet": sheet})
    launch(given)
    call(given, only=slice(1))
    shutil.copy(sheet, copy)
    sheet.write_text("flow_cell_id,barcode,alias\nFAX12345,barcode01,two\n")
    assert with_kept_sheet(given).output.sample_sheet == Workspace(given.out).sample_sheet
    assert "one" in Workspace(given.out).sample_sheet.read_text()
    with pytest.raises(SettingsError, match=r"output\.sample_sheet: .*sheet\.csv is not what it was"):
        launch(given)
    launch(settings(data, out=tmp_path / "out", output={"sample_sheet": copy}))
    with pytest.raises(SettingsError, match=r"output\.sample_sheet: begun with '.*', given None"):
        launch(settings(data, out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text.pod5", "not_pod5"),
        ("empty.pod5", "empty"),
        ("growing.pod5", "unfinished"),
        ("dangling.pod5", "dangling_link"),
        ("dangling", "dangling_link"),
        ("copy.pod5", "duplicate_reads"),
        ("none.pod5", "no_reads"),
        ("flipped.pod5", "corrupt"),
    ],
)
def test_bad_input_costs_only_itself(data: Path, tmp_path: Path, name: str, reason: str) -> None:
    bad = data / "b" / name
    good = (data / "a" / "one.pod5").read_bytes()
    if name.startswith("dangling"):
        bad.symlink_to(tmp_path / "nowhere")
    elif name == "none.pod5":
        write_pod5(bad, [])
    elif name == "flipped.pod5":  # no text any more
        bad.write_bytes(good.replace(b"GridION", b"Grid\xffON"))
    else:
        bad.write_bytes({"text.pod5": b"hello" * 50, "empty.pod5": b"", "growing.pod5": good[:-500]}.get(name, good))
    merged = run(settings(data, out=tmp_path / "out"))
    assert merged.reads == 17
    files = pl.read_parquet(tmp_path / "out" / "input_files.parquet")
    assert files.filter(pl.col("path") == str(bad))["reason"].to_list() == [reason]
    with pytest.raises(SettingsError, match=f"{name}: {reason}"):
        launch(settings(data, out=tmp_path / "strict", strict=True))


def test_input_without_one_readable_read_is_complete_with_an_empty_ledger(tmp_path: Path) -> None:
    (tmp_path / "text.pod5").write_text("hello")
    merged = run(settings(tmp_path / "text.pod5", out=tmp_path / "out"))
    assert (merged.reads, merged.files_not_whole, merged.flawless) == (0, 1, False)
    assert "| Reads | 0: 0 called" in result_markdown(merged)
    assert pl.read_parquet(tmp_path / "out" / "ledger.parquet").height == 0
    assert pl.read_parquet(tmp_path / "out" / "input_files.parquet")["reason"].to_list() == ["not_pod5"]
    report = verify(Workspace(tmp_path / "out"))
    assert (report.reads, report.faults) == (0, [])


def test_a_run_without_a_sample_rate_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    write_pod5(data / "timeless.pod5", [5_000] * 3, seed=3, sample_rate=0)
    merged = run(settings(data, out=tmp_path / "out"))
    assert (merged.reads, merged.records, merged.quarantined) == (20, 16, 0)
    (row,) = pl.read_parquet(tmp_path / "out" / "input_files.parquet").filter(status="skipped").to_dicts()
    assert row["message"].startswith("3 reads: run 00000000 says that it was sampled at 0 Hz")


def test_long_metadata_costs_nothing(tmp_path: Path) -> None:
    path = write_pod5(tmp_path / "one.pod5", [20_000], experiment_name="x" * 300, flow_cell_id="y" * 300)
    assert run(settings(path, out=tmp_path / "out", output={"formats": "fastq,bam"})).called == 1
    assert not verify(Workspace(tmp_path / "out")).faults


def test_a_name_that_is_not_utf8_costs_only_its_file(data: Path, tmp_path: Path) -> None:
    (data / "a" / "one.pod5").rename(data / "a" / os.fsdecode(b"caf\xe9.pod5"))
    merged = run(settings(data, out=tmp_path / "out"))
    assert (merged.reads, merged.files_not_whole) == (5, 1)
    (row,) = pl.read_parquet(tmp_path / "out" / "input_files.parquet").filter(status="skipped").to_dicts()
    assert (row["path"], row["reason"]) == (f"{data}/a/caf\\xe9.pod5", "bad_name")


def test_a_folder_that_cannot_be_read_is_listed(data: Path, tmp_path: Path) -> None:
    """One whose path is too long can't be, also by root."""
    above = os.open(data, os.O_RDONLY)
    path = data
    while len(str(path)) < 4096:
        path /= "deep" * 50
        os.mkdir(path.name, dir_fd=above)
        below = os.open(path.name, os.O_RDONLY, dir_fd=above)
        os.close(above)
        above = below
    os.close(above)
    assert run(settings(data, out=tmp_path / "out")).files_not_whole == 1
    (row,) = pl.read_parquet(tmp_path / "out" / "input_files.parquet").filter(status="skipped").to_dicts()
    assert (row["path"], row["reason"]) == (str(path), "unreadable")
    assert row["message"] == "can't be opened: File name too long"
    with pytest.raises(SettingsError, match="unreadable: can't be opened"):
        launch(settings(data, out=tmp_path / "strict", strict=True))


def test_files_one_joins_the_same_records(data: Path, tmp_path: Path) -> None:
    given = settings(data, out=tmp_path / "out")
    run(given)
    many = records(given.out)
    one = settings(data, out=tmp_path / "out", output={"files": "one"})
    merge(one)
    assert records(given.out) == many
    assert len(list(given.out.rglob("fastq_pass/*.gz"))) <= 2
    assert not verify(Workspace(given.out)).faults


def test_dorados_own_headers_and_columns(data: Path, tmp_path: Path) -> None:
    given = settings(data, out=tmp_path / "out", output={"headers": "dorado", "summary": "dorado-1.4"})
    run(given)
    assert not verify(Workspace(given.out)).faults
    check_from_outside(given.out, data)
    (summary, *_) = given.out.rglob("sequencing_summary*.txt")
    assert summary.read_text().startswith("input_filename\tbatch_id\tparent_read_id\tread_id\t")
    header = next(line for line in records(given.out))
    assert {part.split(":")[0] for part in header.split("\t")[1:]} >= {"RG", "qs", "ch", "st"}


def records(out: Path) -> list[str]:
    return sorted(line for path in out.rglob("fastq_*/*.gz") for line in gzip.open(path, "rt") if line[0] == "@")


def test_read_ids_of_any_uuid_version_are_right(tmp_path: Path) -> None:
    """As simulators make them."""
    write_pod5(tmp_path / "data" / "a.pod5", [20_000] * 3, version=1)
    run(settings(tmp_path / "data", out=tmp_path / "out"))
    assert not verify(Workspace(tmp_path / "out")).faults
    check_from_outside(tmp_path / "out", tmp_path / "data")


@pytest.mark.parametrize("headers", ["minknow", "dorado"])
def test_what_converters_and_people_write_into_metadata_is_written_right(tmp_path: Path, headers: str) -> None:
    names = {"sample_id": 'the "big" one', "experiment_name": '"', "pore_type": 'a "b"'}
    for mux in (0, 9):
        write_pod5(tmp_path / "data" / f'{mux}".pod5', [20_000], seed=mux + 1, mux=mux, **names)
    run(settings(tmp_path / "data", out=tmp_path / "out", output={"headers": headers, "formats": "fastq,bam"}))
    assert verify(Workspace(tmp_path / "out")).faults == []
    (summary, _) = sorted((tmp_path / "out").rglob("sequencing_summary*.txt"))
    assert '"' not in summary.read_text()
    assert "\tthe_big_one\t" in summary.read_text()


def test_another_run_below_the_folder_is_not_counted_in(data: Path, tmp_path: Path) -> None:
    run(settings(data / "a", out=tmp_path / "out"))
    run(settings(data / "b", out=tmp_path / "out" / "more"))
    report = verify(Workspace(tmp_path / "out"))
    assert (report.faults, report.records) == ([], 12)
    assert verify(Workspace(tmp_path / "out" / "more")).records == 4


@pytest.mark.parametrize("damage", ["fastq", "summary", "ledger", "stray"])
def test_verify_finds_damage(data: Path, tmp_path: Path, damage: str) -> None:
    given = settings(data, out=tmp_path / "out")
    run(given)
    if damage == "fastq":
        victim = next(given.out.rglob("fastq_pass/*.gz"))
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "stray":
        victim = next(given.out.rglob("fastq_pass/*.gz"))
        shutil.copy(victim, victim.with_name("stray.fastq.gz"))
    elif damage == "summary":
        victim = next(given.out.rglob("sequencing_summary*.txt"))
        victim.write_text(victim.read_text().replace("TRUE", "true", 1).replace("FALSE", "false", 1))
    else:
        ledger = pl.read_parquet(given.out / "ledger.parquet")
        ledger.head(16).write_parquet(given.out / "ledger.parquet")
    assert verify(Workspace(given.out)).faults


@pytest.mark.parametrize("folder", ["r10_5khz", "rna004", "r9_4khz", "edge"])
def test_real_data_of_all_chemistries(tmp_path: Path, folder: str) -> None:
    source = shared("data", folder)
    given = settings(source, out=tmp_path / "out", engine="cpu")
    merged = run(given)
    assert merged.reads == merged.called + merged.skipped + merged.quarantined
    ledger = pl.read_parquet(tmp_path / "out" / "ledger.parquet")
    if folder == "r10_5khz":
        assert merged.called >= 5
        assert "6 reads in" in check_from_outside(tmp_path / "out", source)
    elif folder != "edge":
        assert ledger["reason"].str.starts_with("wrong_chemistry").all()
    assert not verify(Workspace(given.out)).faults


def test_committed_before_staging_is_gone(data: Path, tmp_path: Path) -> None:
    given = settings(data, out=tmp_path / "out")
    run(given)
    workspace = Workspace(given.out)
    assert committed_ids(workspace) == {batch.batch_id for batch in read_plan(workspace).batches}
    assert not list(workspace.staging.iterdir())
