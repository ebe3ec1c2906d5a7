"""BAM: byte for byte what dorado wrote from the same calls, and read back by htslib."""

from __future__ import annotations

import io
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pysam
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.calls import Barcode, BasecalledRead, EngineIdentity, ModifiedBases, PolyTail
from tasks.core.errors import InputError, SettingsError
from tasks.formats.bam import (
    BamEncoder,
    header,
    iterate_bam,
    join_bam,
    read_group,
    read_group_line,
    tag_bytes,
    write_header,
)
from tasks.formats.bgzf import BgzfWriter
from tests.data import shared
from tests.formats.dorado import recorded
from tests.making import read, run_info

IDENTITY = EngineIdentity(engine="cpu", version="1", model="minnow", model_digest="", stride=6, gpu="A_100")
RUN = run_info()


def call(sequence: str = "ACGTNACGU", **changes: Any) -> BasecalledRead:
    values: dict[str, Any] = {
        "read_id": "r",
        "parent_read_id": "r",
        "sequence": sequence.encode(),
        "qstring": bytes(33 + i % 50 for i in range(len(sequence))),
        "mean_qscore": 12.5,
        "stride": 6,
        "num_samples": 5000,
    }
    return BasecalledRead(**{**values, **changes})


def write(path: Path, *calls: BasecalledRead, references: dict[str, int] | None = None) -> None:
    """Write calls of one read as a BAM file."""
    encoder = BamEncoder(RUN, IDENTITY, references or {})
    groups = {read_group(RUN, IDENTITY, one.barcode): read_group_line(RUN, IDENTITY, one.barcode) for one in calls}
    with path.open("wb") as file:
        writer = BgzfWriter(file)
        write_header(writer, header(IDENTITY, list(groups.values()), references or {}))
        for one in calls:
            writer.write(encoder.records(read(run=RUN), one))
        writer.close()


def read_back(path: Path) -> list[pysam.AlignedSegment]:
    with pysam.AlignmentFile(str(path), check_sq=False) as file:
        return list(file)


@pytest.mark.parametrize(
    "name",
    [
        "Kit14_fast",
        "Kit14_hac",
        "Kit14_sup",
        "Kit14_RNA_hac",
        "HAC_5mCG_5hmCG",
        "HAC_m6A_DRACH_pseU",
        "SUP_4mC_5mC_6mA",
    ],
)
def test_what_dorado_wrote(name: str) -> None:
    path = shared("data", "dorado_bam", f"{name}.bam")
    encoders: dict[str, BamEncoder] = {}
    groups = set()
    written = list(iterate_bam(path))
    for made, theirs in zip(recorded(path), written, strict=True):
        key = made.read.run.protocol_run_id
        if key not in encoders:
            encoders[key] = BamEncoder(made.read.run, made.identity, {})
            groups.add(read_group_line(made.read.run, made.identity))
        assert encoders[key].records(made.read, made.call) == theirs.as_written, theirs.read_id
    with pysam.AlignmentFile(str(path), check_sq=False) as file:
        assert groups == {line for line in str(file.header).splitlines() if line.startswith("@RG")}


def test_every_tag_is_read_back(tmp_path: Path) -> None:
    barcode = Barcode(
        arrangement="barcode03",
        kit="SQK-NBD114-24",
        variant="var1",
        alias="patient 7",
        score=0.75,
        front_score=0.5,
        front_foundseq_length=24,
        front_begin_index=7,
        rear_score=0.75,
        rear_foundseq_length=23,
        rear_end_index=31,
    )
    rich = call(
        "ACGTACGTC",
        read_id="s",
        split_point=700,
        trimmed_samples=10,
        moves=np.array([1, 0, 1, 1], np.uint8),
        modified=ModifiedBases(positions="C+m?,0,1;", probabilities=np.array([7, 255], np.uint8)),
        barcode=barcode,
        poly_tail=PolyTail(length=-1, anchor=3, start=4, end=50),
    )
    write(tmp_path / "a.bam", rich, call(barcode=Barcode(arrangement="unclassified")))
    first, second = read_back(tmp_path / "a.bam")
    tags = {tag: (kind, value) for tag, value, kind in first.get_tags(with_value_type=True)}
    order = "qs du ns ts mx ch st rn fn sm sd sv dx RG pi sp mv pt pa po er me MN MM ML BC bv bi"
    assert list(tags) == order.split()
    assert tags["mv"][1].tolist() == [6, 1, 0, 1, 1]
    assert tags["mv"][1].typecode == "b"
    assert tags["ML"][1].tolist() == [7, 255]
    assert tags["pa"][1].tolist() == [3, 4, 50, -1, -1]
    assert tags["bi"][1].tolist() == [0.75, 7, 24, 0.5, 31, 23, 0.75]
    assert {tag: tags[tag] for tag in ("rn", "pi", "sp", "pt", "BC", "bv")} == {
        "rn": ("i", -1),
        "pi": ("Z", "r"),
        "sp": ("i", 700),
        "pt": ("i", -1),
        "BC": ("Z", "patient_7"),
        "bv": ("Z", "var1"),
    }
    assert first.get_tag("RG") == f"{RUN.protocol_run_id}_minnow_patient_7"
    assert (first.modified_bases or {}) == {("C", 0, "m"): [(1, 7), (8, 255)]}
    assert second.get_tag("RG") == f"{RUN.protocol_run_id}_minnow"
    assert not second.has_tag("BC")
    with pysam.AlignmentFile(str(tmp_path / "a.bam"), check_sq=False) as file:
        group = file.header.to_dict()["RG"][0]
    assert (group["SM"], group["al"], group["bk"]) == ("barcode03", "patient_7", "SQK-NBD114-24")


def test_a_duplex_call_has_dorados_duplex_tags(tmp_path: Path) -> None:
    write(tmp_path / "a.bam", call(duplex=1, duplex_parents=("a", "b")))
    (record,) = read_back(tmp_path / "a.bam")
    assert [tag for tag, _ in record.get_tags()] == ["qs", "dx", "mx", "ch", "st", "RG", "po"]


@given(st.text("ACGT", min_size=1, max_size=300), st.data())
def test_any_sequence_comes_back(sequence: str, data: st.DataObject) -> None:
    qualities = bytes(data.draw(st.lists(st.integers(33, 126), min_size=len(sequence), max_size=len(sequence))))
    encoded = BamEncoder(RUN, IDENTITY, {}).records(read(run=RUN), call(sequence, qstring=qualities))
    target = io.BytesIO()
    writer = BgzfWriter(target)
    writer.write(header(IDENTITY, [read_group_line(RUN, IDENTITY)], {}) + encoded)
    writer.close()
    text = subprocess.run(["samtools", "view", "-"], input=target.getvalue(), capture_output=True, check=True)
    assert text.stderr == b""
    assert text.stdout.split(b"\t")[9:11] == [sequence.encode(), qualities]


def sam(flag: int, cigar: str, sequence: str, *tags: str, position: int = 101) -> str:
    quality = "*" if sequence == "*" else "5" * len(sequence)
    return "\t".join(["r", str(flag), "chr2", str(position), "60", cigar, "*", "0", "0", sequence, quality, *tags])


def test_alignments_are_written_as_the_aligner_gave_them(tmp_path: Path) -> None:
    modified = ModifiedBases(positions="C+m?,0;", probabilities=np.array([9], np.uint8))
    lines = (
        sam(16, "2S6M1S", "ACGTTACGT", "NM:i:1", "qs:f:3", "MD:Z:3A2", "zz:B:s,-5,7", "de:f:0.5", "zA:A:x"),
        sam(256, "9M", "*", "NM:i:4000000000"),
        sam(2048, "4H5M", "ACGTA", position=50_000_001),
    )
    aligned = call("ACGTAACGT", alignments=lines, modified=modified, moves=np.ones(9, np.uint8))
    write(tmp_path / "a.bam", aligned, references={"chr1": 10, "chr2": 60_000_000})
    first, second, third = read_back(tmp_path / "a.bam")
    assert (first.reference_name, first.reference_start, first.cigarstring) == ("chr2", 100, "2S6M1S")
    assert first.get_tags()[0] == ("qs", 12.5)
    assert [tag for tag, _ in first.get_tags()][-8:] == ["MN", "MM", "ML", "NM", "MD", "zz", "de", "zA"]
    assert first.get_tag("zz").tolist() == [-5, 7]
    assert (second.query_sequence, second.get_tag("NM"), second.has_tag("mv")) == (None, 4_000_000_000, False)
    assert (third.query_sequence, third.has_tag("MM"), third.reference_start) == ("ACGTA", False, 50_000_000)
    with pysam.AlignmentFile(str(tmp_path / "a.bam")) as file:
        assert file.references == ("chr1", "chr2")


def test_a_primary_alignment_without_sequence_has_the_calls(tmp_path: Path) -> None:
    one = call("AACGT", alignments=(sam(16, "5M", "*"),))
    write(tmp_path / "a.bam", one, references={"chr2": 1000})
    (record,) = read_back(tmp_path / "a.bam")
    assert record.query_sequence == "ACGTT"
    assert list(record.query_qualities or []) == [4, 3, 2, 1, 0]


def test_more_operations_than_a_record_holds(tmp_path: Path) -> None:
    count = 40_000
    long = call("A" * 2 * count, alignments=(sam(0, "1M1I" * count, "A" * 2 * count),))
    write(tmp_path / "a.bam", long, references={"chr2": 10**6})
    (record,) = read_back(tmp_path / "a.bam")
    assert len(record.cigartuples or []) == 2 * count


def test_an_alignment_to_what_is_not_in_the_reference_is_refused() -> None:
    encoder = BamEncoder(RUN, IDENTITY, {"chr1": 10})
    with pytest.raises(SettingsError, match=r"output.reference: read r is aligned to 'chr2'"):
        encoder.records(read(run=RUN), call(alignments=(sam(0, "9M", "ACGTAACGT"),)))


def test_joined_files_have_one_header_and_all_records(tmp_path: Path) -> None:
    parts = []
    for number, name in enumerate(("a", "b")):
        path = tmp_path / f"{name}.bam"
        parts.append(path)
        write(path, call(read_id=f"r{number}"), call("A", read_id=f"s{number}", barcode=Barcode(arrangement=name)))
    with (tmp_path / "joined.bam").open("wb") as file:
        join_bam(parts, file, groups=["@RG\tID:more\tPL:ONT"])
    subprocess.run(["samtools", "quickcheck", "-u", tmp_path / "joined.bam"], check=True)
    assert [record.query_name for record in read_back(tmp_path / "joined.bam")] == ["r0", "s0", "r1", "s1"]
    known = f"{RUN.protocol_run_id}_minnow"
    with pysam.AlignmentFile(str(tmp_path / "joined.bam"), check_sq=False) as file:
        assert [group["ID"] for group in file.header.to_dict()["RG"]] == [known, f"{known}_a", f"{known}_b", "more"]


def test_samtools_reads_it_without_a_warning(tmp_path: Path) -> None:
    mods = ModifiedBases(positions="C+m?,0,0;", probabilities=np.array([9, 200], np.uint8))
    write(tmp_path / "a.bam", call("ACGTACGT", modified=mods, moves=np.ones(8, np.uint8)), call())
    for command in (["quickcheck", "-u", "-v"], ["view", "-h"], ["stats"], ["flagstat"]):
        done = subprocess.run(["samtools", *command, tmp_path / "a.bam"], capture_output=True, text=True, check=True)
        assert done.stderr == ""


def test_a_record_gets_another_barcode_and_nothing_else_changes(tmp_path: Path) -> None:
    barcode = Barcode(arrangement="barcode01", kit="KIT")
    rich = call(barcode=barcode, moves=np.ones(5, np.uint8), poly_tail=PolyTail(length=5))
    write(tmp_path / "a.bam", rich)
    (record,) = iterate_bam(tmp_path / "a.bam")
    alias = replace(rich, barcode=replace(barcode, alias="A"))
    assert record.with_barcode(f"{RUN.protocol_run_id}_minnow_A", "A") == BamEncoder(RUN, IDENTITY, {}).records(
        read(run=RUN), alias
    )


@pytest.mark.parametrize("damage", ["text", "cut", "flipped"])
def test_what_is_not_bam_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.bam"
    write(path, *[call("ACGT" * 3000)] * 5)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"text": b"hello", "cut": path.read_bytes()[:-2000], "flipped": bytes(content)}[damage])
    with pytest.raises(InputError, match=r"a\.bam"):
        list(iterate_bam(path))


@pytest.mark.parametrize("field", ["NM", "NM:q:5"])
def test_what_is_no_optional_field_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match="not an optional field of SAM"):
        tag_bytes(field)
