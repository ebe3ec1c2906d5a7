"""All that a caller returns, through split, merge, verify and sorting again: a caller that makes it up, real files."""

from __future__ import annotations

import csv
import hashlib
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid5

import numpy as np
import polars as pl
import pysam
import pytest
from isal import igzip

from deployments import cli
from tasks.core.alignment import reverse_complement
from tasks.core.calls import Barcode, BasecalledRead, EngineIdentity, ModifiedBases, Outcome, PolyTail
from tasks.core.errors import SettingsError
from tasks.core.reads import Read
from tasks.engines.null import NULL_IDENTITY, NullEngine
from tasks.formats.resort import Choice, choose
from tasks.formats.samplesheet import read_sample_sheet
from tasks.formats.summary import validate_summary
from tasks.formats.workspace import Workspace, read_json
from tasks.launch import launch
from tasks.merge import merge
from tasks.settings import RunSettings
from tasks.verify import verify
from tests.making import read_uuid, write_pod5
from tests.test_pipeline import call, settings

KIT = "SQK-NBD114-24"


class RichEngine:
    """Makes calls up with everything that a caller may return, by the read's number: barcodes, tails, splits, …"""

    identity: EngineIdentity = replace(NULL_IDENTITY, modified_base_models=("5mC",), gpu="A_100")

    def __init__(self, reference: bytes = b"") -> None:
        self._reference = reference

    def basecall(self, reads: Iterable[Read]) -> Iterator[tuple[Read, Outcome]]:
        for read, outcome in NullEngine().basecall(reads):
            yield read, Outcome.called(*self._calls(read, outcome.calls[0])) if outcome.calls else outcome

    def close(self) -> None:
        """Hold nothing."""

    def _calls(self, read: Read, made: BasecalledRead) -> Iterator[BasecalledRead]:
        barcodes = (
            Barcode(arrangement="barcode01", kit=KIT, variant="var1", score=0.9, front_score=0.9, front_begin_index=3),
            Barcode(arrangement="barcode02", kit=KIT, score=0.7, front_foundseq_length=24),
            Barcode(arrangement="unclassified"),
        )
        made = replace(
            made,
            moves=np.ones(read.num_samples // made.stride, np.uint8),
            modified=ModifiedBases(
                positions="C+m?" + ",0" * made.sequence.count(b"C") + ";",
                probabilities=np.full(made.sequence.count(b"C"), 200, np.uint8),
            ),
            barcode=barcodes[read.read_number % 3],
            poly_tail=PolyTail(length=31, anchor=5, start=6, end=90) if read.read_number % 2 else None,
            alignments=self._aligned(read, made) if self._reference else None,
        )
        if read.read_number % 5:
            yield made
            return
        half = read.num_samples // 2
        for number, start in enumerate((0, half)):
            yield replace(
                made, read_id=str(uuid5(UUID(read.read_id), str(number))), split_point=start, num_samples=half
            )

    def _aligned(self, read: Read, made: BasecalledRead) -> tuple[str, ...]:
        """Claim that the read is its stretch of the reference, on either strand, and half of them are not aligned."""
        sequence, quality = made.sequence.decode(), made.qstring.decode()
        if read.read_number % 2:
            return (f"{made.read_id}\t4\t*\t0\t0\t*\t*\t0\t0\t{sequence}\t{quality}",)
        place = f"chr1\t{1 + read.read_number}\t60\t{len(sequence)}M\t*\t0\t0"
        back = f"{reverse_complement(made.sequence).decode()}\t{quality[::-1]}"
        return (
            f"{made.read_id}\t16\t{place}\t{back}\tNM:i:7\tAS:i:99",
            f"{made.read_id}\t272\t{place}\t*\t*\tNM:i:9",
        )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_pod5(folder / "one.pod5", [20_000] * 14, seed=1)
    write_pod5(folder / "two.pod5", [9_000, 5, 30_000], seed=2, flow_cell_id="FAX2", experiment_name="other")
    return folder


def run(given: RunSettings, engine: RichEngine | None = None) -> RunSettings:
    launch(given)
    call(given, engine or RichEngine())
    merge(given)
    return given


def content(out: Path) -> dict[str, str]:
    """Digest all that a run writes for people, but what tells the time."""
    files = [path for path in out.rglob("*") if path.is_file() and ".shoal" not in path.parts]
    timed = ("final_summary", "output_hash", "provenance", "ledger", "input_files")
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not path.name.startswith(timed)
    }


def in_fastq(path: Path) -> list[str]:
    with igzip.open(path, "rt") as file:
        return [line[1:].split()[0] for number, line in enumerate(file) if number % 4 == 0]


def in_bam(path: Path) -> list[str]:
    with pysam.AlignmentFile(str(path), check_sq=False) as file:
        return [str(record.query_name) for record in file.fetch(until_eof=True) if not record.is_secondary]


def rows(out: Path) -> pl.DataFrame:
    read = [
        pl.read_csv(path, separator="\t", infer_schema=False) for path in sorted(out.rglob("sequencing_summary*.txt"))
    ]
    return pl.concat(read, how="diagonal")


@pytest.mark.parametrize("files", ["many", "one"])
def test_every_call_is_in_one_fastq_and_one_bam_file_of_its_barcode(data: Path, tmp_path: Path, files: str) -> None:
    output = {"formats": "fastq,bam", "files": files, "barcoding_summary": True}
    given = run(settings(data, out=tmp_path / "out", output=output))
    report = verify(Workspace(given.out))
    assert report.faults == []
    assert report.records == 20  # 16 reads called, 4 of them split
    fastqs = {path.name: in_fastq(path) for path in given.out.rglob("fastq_*/*/*.fastq.gz")}
    bams = {path.name: in_bam(path) for path in given.out.rglob("bam_*/*/*.bam")}
    assert {name.removesuffix(".fastq.gz"): ids for name, ids in fastqs.items()} == {
        name.removesuffix(".bam"): ids for name, ids in bams.items()
    }
    assert max(Counter(read_id for ids in fastqs.values() for read_id in ids).values()) == 1
    summary = rows(given.out)
    for row in summary.iter_rows(named=True):
        assert row["read_id"] in fastqs[row["filename_fastq"]]
        assert row["read_id"] in bams[row["filename_bam"]]
        assert f"_{row['alias']}_" in row["filename_fastq"]
        assert ("pass" if row["passes_filtering"] == "TRUE" else "fail") in row["filename_fastq"]
    folders = {path.parent.name for path in given.out.rglob("bam_*/*/*.bam")}
    assert folders == {"barcode01", "barcode02", "unclassified"}
    for path in given.out.rglob("*.bam"):
        subprocess.run(["samtools", "quickcheck", "-u", path], check=True)
    hashed = next(path for path in given.out.rglob("output_hash*.csv") if "FAX12345" in path.name)
    with hashed.open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert {(row["barcode"], row["barcode_alias"]) for row in listed} == {(name, name) for name in folders}
    scored = pl.concat(
        pl.read_csv(path, separator="\t", infer_schema=False) for path in given.out.rglob("barcoding_summary*.txt")
    )
    assert scored.width == 19
    assert sorted(scored["read_id"]) == sorted(summary["read_id"])
    assert set(scored["barcode_front_id"]) == {"."}


def test_groups_are_whole_and_in_the_profiles_manner(data: Path, tmp_path: Path) -> None:
    given = run(settings(data, out=tmp_path / "out"))
    for path in given.out.rglob("sequencing_summary*.txt"):
        assert list(validate_summary(path)) == []
    by_number = {row["read_id"]: row for row in rows(given.out).iter_rows(named=True)}
    first, second, third = (by_number[str(read_uuid(1, number))] for number in (1, 2, 3))
    assert (first["barcode_arrangement"], first["alias"], first["type"]) == ("barcode02", "barcode02", "-")
    assert (first["barcode_variant"], first["barcode_front_foundseq_length"]) == ("n/a", "24")
    assert (first["poly_tail_length"], first["poly_tail_start"], first["poly_tail2_end"]) == ("31", "6", "-1")
    assert (second["barcode_arrangement"], second["barcode_kit"], second["barcode_score"]) == ("unclassified", "-", "-")
    assert (second["poly_tail_length"], third["barcode_score"], third["barcode_variant"]) == ("-1", "0.900000", "var1")
    merge(settings(data, out=tmp_path / "out", output={"summary": "dorado-1.4"}))
    for path in given.out.rglob("sequencing_summary*.txt"):
        assert list(validate_summary(path)) == []
    by_number = {row["read_id"]: row for row in rows(given.out).iter_rows(named=True)}
    second = by_number[str(read_uuid(1, 2))]
    assert (second["barcode_kit"], second["barcode_score"], second["type"]) == ("unknown", "-1.000000", "unknown")
    assert (second["poly_tail_length"], second["poly_tail_start"]) == ("-2", "-1")


def test_split_reads_are_accounted_for(data: Path, tmp_path: Path) -> None:
    given = run(settings(data, out=tmp_path / "out", output={"formats": "bam"}))
    ledger = pl.read_parquet(given.out / "ledger.parquet")
    assert ledger["products"].sum() == 20
    summary = next(path for path in given.out.rglob("sequencing_summary*.txt") if "FAX12345" in path.name)
    lines = summary.read_text().splitlines()
    summary.write_text("\n".join(lines[:-1]) + "\n")
    assert any("ledger and summary" in fault for fault in verify(Workspace(given.out)).faults)


@pytest.fixture
def aligned(data: Path, tmp_path: Path) -> RunSettings:
    reference = tmp_path / "reference.fa"
    reference.write_text(">chr0\nACGT\n>chr1\n" + "ACGT" * 1000 + "\n")
    output = {"formats": "bam,sam,cram", "reference": reference}
    return run(settings(data, out=tmp_path / "out", output=output), RichEngine(reference.read_bytes()))


def test_alignments_in_bam_sam_and_cram(aligned: RunSettings, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert verify(Workspace(aligned.out)).faults == []
    assert capfd.readouterr().err == ""  # htslib's complaints, too
    reference = str(aligned.output.reference)
    for path in aligned.out.rglob("bam_*/*/*.bam"):

        def lines(*options: str, of: Path = path) -> list[str]:
            done = subprocess.run(["samtools", "view", *options, of], capture_output=True, text=True, check=True)
            assert done.stderr == ""
            return done.stdout.splitlines()

        verdict = path.parents[1].name.replace("bam", "cram")
        cram = path.parents[2] / verdict / path.parent.name / f"{path.stem}.cram"
        assert lines("--no-PG", "-h") == path.with_suffix(".sam").read_text().splitlines()
        assert [line.split("\t")[:11] for line in lines("-T", reference, of=cram)] == [
            line.split("\t")[:11] for line in lines()
        ]
        assert "@SQ\tSN:chr1\tLN:4000" in lines("--no-PG", "-H")
    for row in rows(aligned.out).iter_rows(named=True):
        if row["alignment_genome"] == "-":
            assert {value for name, value in row.items() if name.startswith("alignment_")} == {"-"}
        else:
            length = int(row["sequence_length_template"])
            assert row["alignment_genome"] == "chr1"
            assert (int(row["alignment_num_correct"]), row["alignment_num_secondary_alignments"]) == (length - 7, "1")
            assert row["alignment_accuracy"] == f"{(length - 7) / length:.6f}"
    for path in aligned.out.rglob("sequencing_summary*.txt"):
        assert list(validate_summary(path)) == []


def test_cram_without_a_reference_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"output: cram needs output\.reference"):
        settings(data, out=tmp_path / "out", output={"formats": "cram"})


def test_another_qscore_gives_what_calling_with_it_gives(data: Path, tmp_path: Path) -> None:
    output = {"formats": "fastq,bam", "files": "one"}
    given = run(settings(data, out=tmp_path / "out[1]", output={**output, "min_qscore": 5}))
    wanted = run(settings(data, out=tmp_path / "wanted", output={**output, "min_qscore": 10}))
    assert content(given.out) != content(wanted.out)
    choose(Workspace(given.out), Choice(min_qscore=10))
    merge(given)
    assert content(given.out) == content(wanted.out)
    assert verify(Workspace(given.out)).faults == []


@pytest.mark.parametrize("headers", ["minknow", "dorado"])
def test_a_sample_sheet_gives_what_calling_with_it_gives(data: Path, tmp_path: Path, headers: str) -> None:
    sheet = tmp_path / "sheet.csv"
    sheet.write_text("flow_cell_id,barcode,alias,type\nFAX12345,barcode01,pat.1,test_sample\nFAX2,barcode02,pat.2,\n")
    output = {"formats": "fastq,bam", "headers": headers}
    given = run(settings(data, out=tmp_path / "out", output=output))
    wanted = run(settings(data, out=tmp_path / "wanted", output={**output, "sample_sheet": sheet}))
    found = set(zip(rows(wanted.out)["alias"], rows(wanted.out)["type"], strict=True))
    assert found == {
        ("pat.1", "test_sample"),
        ("barcode02", "-"),
        ("barcode01", "-"),
        ("unclassified", "-"),
    }
    assert {path.parent.name for path in wanted.out.rglob("fastq_*/*/*.gz")} == {alias for alias, _ in found}
    choose(Workspace(given.out), Choice(sheet=read_sample_sheet(sheet)))
    merge(given)
    assert content(given.out) == content(wanted.out)
    assert verify(Workspace(given.out)).faults == []
    choose(Workspace(given.out), Choice())
    merge(given)
    assert content(given.out) == content(run(settings(data, out=tmp_path / "plain", output=output)).out)


def test_runs_whose_input_is_archived_are_sorted_and_merged_again(data: Path, tmp_path: Path) -> None:
    sheet, other = tmp_path / "sheet.csv", tmp_path / "other.csv"
    sheet.write_text("flow_cell_id,barcode,alias\nFAX12345,barcode01,pat.1\n")
    other.write_text("flow_cell_id,barcode,alias\nFAX12345,barcode01,pat.9\n")
    given = run(settings(data, out=tmp_path / "out", output={"formats": "fastq,bam", "sample_sheet": sheet}))
    workspace = Workspace(given.out)
    before = read_json(workspace.provenance)["settings"]
    shutil.rmtree(data)
    sheet.unlink()
    assert cli.resplit(given.out, min_qscore=60) == cli.Exit.FLAWED  # one read is too short
    assert set(rows(given.out)["passes_filtering"]) == {"FALSE"}
    assert cli.demux(given.out, sample_sheet=other) == cli.Exit.FLAWED
    assert "pat.9" in set(rows(given.out)["alias"])
    assert cli.merge(given.out, files="one") == cli.Exit.FLAWED
    assert verify(workspace).faults == []
    after = read_json(workspace.provenance)["settings"]
    assert (after["input"], after["output"]["sample_sheet"]) == (before["input"], before["output"]["sample_sheet"])


def test_new_input_is_sorted_as_chosen(data: Path, tmp_path: Path) -> None:
    given = run(settings(data, out=tmp_path / "out", output={"formats": "bam"}))
    choose(Workspace(given.out), Choice(min_qscore=60))
    merge(given)
    write_pod5(data / "more.pod5", [15_000] * 3, seed=3)
    merged = merge(run(given))
    assert (merged.records, merged.passed) == (24, 0)


def test_u_is_written_as_t_on_request(data: Path, tmp_path: Path) -> None:
    class Rna(RichEngine):
        def _calls(self, read: Read, made: BasecalledRead) -> Iterator[BasecalledRead]:
            yield replace(made, sequence=made.sequence.replace(b"T", b"U"))

    def bases(out: Path) -> set[str]:
        return {
            base
            for path in out.rglob("*.fastq.gz")
            if "fastq_" in str(path.relative_to(out))
            for line in igzip.open(path, "rt").read().splitlines()[1::4]
            for base in line
        }

    kept = run(settings(data, out=tmp_path / "rna"), Rna())
    changed = run(settings(data, out=tmp_path / "dna", output={"rna_as_dna": True}), Rna())
    assert (bases(kept.out), bases(changed.out)) == (set("ACGU"), set("ACGT"))


@pytest.mark.parametrize("damage", ["flipped", "gone", "doubled"])
def test_verify_finds_damaged_bam(data: Path, tmp_path: Path, damage: str) -> None:
    given = run(settings(data, out=tmp_path / "out", output={"formats": "fastq,bam", "files": "one"}))
    victim = max(given.out.rglob("bam_*/*/*.bam"), key=lambda path: path.stat().st_size)
    if damage == "flipped":
        whole = bytearray(victim.read_bytes())
        whole[len(whole) // 2] ^= 1
        victim.write_bytes(whole)
    elif damage == "gone":
        victim.unlink()
    else:
        victim.with_name("copy.bam").write_bytes(victim.read_bytes())
    assert verify(Workspace(given.out)).faults
