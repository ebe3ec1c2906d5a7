"""dorado's command line, and its SAM: in tables, and as dorado itself wrote it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pysam
import pytest

from tasks.core.calls import Barcode, BasecalledRead, EngineIdentity, PolyTail
from tasks.core.dorado_program import (
    Counted,
    Header,
    Wanted,
    command_line,
    counted,
    is_complex,
    parse_record,
    sample_sheet,
    unexplained,
)
from tasks.formats.bam import BamEncoder, header
from tests.data import shared
from tests.formats.dorado import recorded

GROUP = (
    "@RG\tID:run_hac\tPU:FAX\tPM:2A\tDT:x\tPL:ONT\tDS:runid=run basecall_model=hac@v5 "
    "modbase_models=a@v1,b@v2 experiment_id=my experiment model_stride=6\tLB:s"
)
BARCODED = GROUP.replace("run_hac", "run_hac_patient") + "\tBC:ACGT\tbk:SQK-NBD\tSM:barcode07\tal:patient"
UNALIASED = GROUP.replace("run_hac", "run_hac_K_barcode01") + "\tbk:K\tSM:barcode01\tal:barcode01"
TAGS = [
    *("qs:f:12.5", "du:f:1", "ns:i:5000", "ts:i:10", "mx:i:1", "ch:i:2", "st:Z:t", "rn:i:3", "fn:Z:f"),
    *("sm:f:94", "sd:f:24", "sv:Z:pa", "dx:i:0"),
]


@pytest.mark.parametrize(
    ("wanted", "given", "expected"),
    [
        ({}, {}, "hac DATA --emit-sam"),
        (
            {"model": "sup@v5.2.0", "modified_bases": ("5mCG_5hmCG", "6mA")},
            {},
            "sup@v5.2.0,5mCG_5hmCG,6mA DATA --emit-sam",
        ),
        (
            {"model": "dna_sup@v5", "modified_bases": ("5mCG", "6mA"), "moves": True},
            {"model": "/models/dna_sup@v5"},
            "/models/dna_sup@v5 DATA --emit-sam --emit-moves --modified-bases 5mCG 6mA",
        ),
        ({"trim": "all"}, {}, "hac DATA --emit-sam"),
        ({"trim": "adapters"}, {}, "hac DATA --emit-sam --trim adapters"),
        ({"trim": "none"}, {}, "hac DATA --emit-sam --trim none"),
        (
            {"kit": "SQK-NBD114-24", "barcode_both_ends": True},
            {"sample_sheet": "s.csv"},
            "hac DATA --emit-sam --kit-name SQK-NBD114-24 --sample-sheet s.csv --barcode-both-ends",
        ),
        (
            {"poly_a": True, "poly_a_config": "p.toml"},
            {},
            "hac DATA --emit-sam --estimate-poly-a --poly-a-config p.toml",
        ),
        ({"reference": "r.fa", "bed": "b.bed"}, {}, "hac DATA --emit-sam --reference r.fa --bed-file b.bed"),
        (
            {"device": "cuda:0", "models": "/m", "arguments": ("--batchsize", "64")},
            {"read_ids": "ids.txt"},
            "hac DATA --emit-sam --read-ids ids.txt --models-directory /m --device cuda:0 --batchsize 64",
        ),
    ],
)
def test_command_line(wanted: dict[str, Any], given: dict[str, str], expected: str) -> None:
    command = command_line("dorado", Wanted(**{"model": "hac", **wanted}), "DATA", **given)
    assert " ".join(command) == f"dorado basecaller {expected}"


@pytest.mark.parametrize(
    ("model", "complex_"),
    [
        ("fast", True),
        ("hac", True),
        ("sup@latest", True),
        ("sup@v5.2.0", True),
        ("hac@v5", True),
        ("hac@5.2.0", False),
        ("hac,6mA", False),
        ("dna_r10.4.1_e8.2_400bps_hac@v5.2.0", False),
        ("models/hac", False),
        ("", False),
    ],
)
def test_complexes(model: str, complex_: bool) -> None:
    assert is_complex(model) is complex_


def test_sample_sheet() -> None:
    made = sample_sheet("KIT", ["barcode01", "barcode07"], flow_cell="FAX1", experiment="my (first) one")
    assert made.splitlines() == [
        "flow_cell_id,kit,experiment_id,barcode",
        "FAX1,KIT,my__first__one,barcode01",
        "FAX1,KIT,my__first__one,barcode07",
    ]


def head(*lines: str) -> Header:
    made = Header()
    for line in ("@HD\tVN:1.6", "@PG\tID:basecaller\tPN:dorado\tVN:1.4.0\tCL:dorado\tDS:gpu:A 100", *lines):
        made.take(line + "\n")
    return made


def sam(*more: str, flag: int = 4, group: str = "run_hac", sequence: str = "AACGT", quality: str = '!"#$%') -> str:
    fields = ["r", str(flag), "*", "0", "0", "*", "*", "0", "0", sequence, quality, *TAGS, f"RG:Z:{group}", *more]
    return "\t".join(fields) + "\n"


def call_in(line: str, *groups: str, barcoded: bool = False) -> BasecalledRead:
    call = parse_record(line, head(*(groups or (GROUP,))), barcoded=barcoded).call
    assert call is not None
    return call


def identity_in(header: Header) -> EngineIdentity:
    identity = header.identity()
    assert identity is not None
    return identity


def test_header() -> None:
    identity = identity_in(head(GROUP, BARCODED))
    assert (identity.engine, identity.version, identity.model) == ("dorado", "1.4.0", "hac@v5")
    assert (identity.stride, identity.gpu, identity.modified_base_models) == (6, "A_100", ("a@v1", "b@v2"))
    assert head().identity() is None


def test_a_simple_record() -> None:
    call = call_in(sam())
    assert (call.read_id, call.parent_read_id, call.split) == ("r", "r", False)
    assert (call.sequence, call.qstring, call.mean_qscore) == (b"AACGT", b'!"#$%', 12.5)
    assert (call.num_samples, call.trimmed_samples, call.stride) == (5000, 10, 6)
    assert (call.scaling_midpoint, call.scaling_dispersion, call.scaling_version) == (94, 24, "pa")
    assert (call.moves, call.modified, call.barcode, call.poly_tail, call.duplex) == (None, None, None, None, 0)


def test_a_rich_record() -> None:
    call = call_in(
        sam(
            "pi:Z:p",
            "sp:i:700",
            "mv:B:c,5,1,0,1",
            "pt:i:20",
            "pa:B:i,1,2,3,-1,-1",
            "MN:i:5",
            "MM:Z:C+m?,0;",
            "ML:B:C,9",
        )
    )
    assert (call.parent_read_id, call.split_point, call.stride) == ("p", 700, 5)
    assert call.moves is not None
    assert call.moves.tolist() == [1, 0, 1]
    assert call.moves.dtype == np.uint8
    assert call.poly_tail == PolyTail(length=20, anchor=1, start=2, end=3)
    assert call.modified is not None
    assert (call.modified.positions, call.modified.probabilities.tolist()) == ("C+m?,0;", [9])


def test_no_modified_base_in_a_read() -> None:
    call = call_in(sam("MN:i:5", "MM:Z:C+m?;", "ML:B:C"))
    assert call.modified is not None
    assert len(call.modified.probabilities) == 0


FIGURES = ("bv:Z:var2", "bi:B:f,0.75,7,24,0.5,31,23,0.625")
SCORES = {
    "variant": "var2",
    "score": 0.75,
    "front_begin_index": 7,
    "front_foundseq_length": 24,
    "front_score": 0.5,
    "rear_end_index": 31,
    "rear_foundseq_length": 23,
    "rear_score": 0.625,
}


@pytest.mark.parametrize(
    ("group", "more", "expected"),
    [
        ("run_hac", (), {"arrangement": "unclassified"}),
        ("run_hac", FIGURES, {"arrangement": "unclassified", **SCORES}),
        (
            "run_hac_patient",
            ("BC:Z:patient",),
            {"arrangement": "barcode07", "kit": "SQK-NBD", "alias": "patient"},
        ),
        ("run_hac_K_barcode01", ("BC:Z:K_barcode01", *FIGURES), {"arrangement": "barcode01", "kit": "K", **SCORES}),
        ("elsewhere", ("BC:Z:SQK-RBK_24_barcode03A",), {"arrangement": "barcode03A", "kit": "SQK-RBK_24"}),
        ("elsewhere", ("BC:Z:barcode03",), {"arrangement": "barcode03"}),
    ],
)
def test_barcodes(group: str, more: tuple[str, ...], expected: dict[str, Any]) -> None:
    line = sam(*more, "mv:B:c,6,1", group=group)
    assert call_in(line, GROUP, BARCODED, UNALIASED, barcoded=True).barcode == Barcode(**expected)
    assert call_in(line, GROUP, BARCODED, UNALIASED).barcode is None


def test_alignments() -> None:
    reverse = parse_record(sam("NM:i:0", flag=16), head(GROUP), barcoded=False)
    assert reverse.call is not None
    assert (reverse.call.sequence, reverse.call.qstring) == (b"ACGTT", b'%$#"!')
    assert reverse.line.endswith("NM:i:0")
    for flag in (256, 2048, 2064):
        assert parse_record(sam("pi:Z:p", flag=flag), head(GROUP), barcoded=False).call is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("terminate called\n", "11 fields or more, not 1"),
        (sam(quality="!!"), "5 bases and 2 qualities in the record of r"),
        (sam().replace("\tns:i:5000", ""), "the record of r has no tag ns"),
        (sam(group="other"), "set engine.moves"),
    ],
)
def test_what_is_no_record(line: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_record(line, head(GROUP), barcoded=False)


LOG = "[2026] [info] > Simplex reads basecalled: 12\n[2026] [info] > Simplex reads filtered: 3\n"


@pytest.mark.parametrize(
    ("log", "expected"),
    [("", Counted()), (LOG, Counted(basecalled=12, filtered=3)), (LOG.splitlines()[0], Counted(basecalled=12))],
)
def test_counted(log: str, expected: Counted) -> None:
    assert counted(log) == expected


@pytest.mark.parametrize(
    ("missing", "filtered", "lost"),
    [
        ([], None, ()),
        ([("a", 99)], None, ()),
        ([("a", 100)], None, ("a",)),
        ([("a", 100), ("b", 99)], 1, ()),
        ([("a", 100), ("b", 5000)], 1, ("a", "b")),
        ([("a", 100), ("b", 5000)], 2, ()),
    ],
)
def test_unexplained(missing: list[tuple[str, int]], filtered: int | None, lost: tuple[str, ...]) -> None:
    assert unexplained(missing, Counted(filtered=filtered)) == lost


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
def test_what_dorado_wrote_goes_through(name: str, tmp_path: Path) -> None:
    """Each record of dorado's, as SAM, parsed and encoded by us as BAM, has the same fields, tags and values."""
    path = shared("data", "dorado_bam", f"{name}.bam")
    with pysam.AlignmentFile(str(path), check_sq=False) as file:
        parsed = Header()
        for line in str(file.header).splitlines():
            parsed.take(line)
        theirs = [record.to_string() for record in file]
    ours = bytearray(header(identity_in(parsed), [], {}))
    for line, made in zip(theirs, recorded(path), strict=True):
        assert parsed.identity() == replace(made.identity, gpu=made.identity.gpu.replace(" ", "_"))
        call = parse_record(line, parsed, barcoded=False).call
        assert call is not None
        ours += BamEncoder(made.read.run, made.identity, {}).records(made.read, call)
    (tmp_path / "ours.bam").write_bytes(ours)  # htslib reads BAM that is not compressed, too
    with pysam.AlignmentFile(str(tmp_path / "ours.bam"), check_sq=False) as file:
        assert [record.to_string() for record in file] == theirs
