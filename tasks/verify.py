"""Verify: a finished run folder, checked from what lies in it."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from isal import igzip

from tasks.core.ledger import prove
from tasks.formats.planfile import has_plan, iterate_reads
from tasks.formats.pod5 import format_read_id
from tasks.formats.summary import validate_summary
from tasks.formats.workspace import Workspace

#: Faults listed before verify stops looking for more of a kind.
ENOUGH = 1000


@dataclass(slots=True, kw_only=True)
class VerifyReport:
    """What was checked, and what is wrong."""

    reads: int = 0
    records: int = 0
    values: int = 0
    files: int = 0
    faults: list[str] = field(default_factory=list)


def verify(workspace: Workspace) -> VerifyReport:
    """Check a run folder: ledger against plan, FASTQ against summary against ledger, every value, every checksum.

    Holds 16 bytes per read for each of ledger, FASTQ and summary.
    """
    report = VerifyReport()
    if not workspace.ledger.exists():
        report.faults.append(f"{workspace.ledger} is not there: the run is not complete")
        return report
    called = _check_ledger(workspace, report)
    summaries = sorted(workspace.out.rglob("sequencing_summary*.txt"))
    fastqs = sorted(path for kind in ("pass", "fail") for path in workspace.out.rglob(f"fastq_{kind}/**/*.fastq.gz"))
    in_fastq = _ids(read_id for path in fastqs for read_id in _fastq_ids(path, report))
    in_summary = _ids(read_id for path in summaries for read_id in _summary_ids(path, report))
    report.records = len(in_fastq)
    _compare("FASTQ and summary", in_fastq, in_summary, report)
    _compare("ledger and FASTQ", called, in_fastq, report)
    named = {path for table in sorted(workspace.out.rglob("output_hash*.csv")) for path in _hashed(table, report)}
    report.faults += [f"{path} is named in no output_hash table" for path in fastqs if path not in named]
    return report


def _check_ledger(workspace: Workspace, report: VerifyReport) -> npt.NDArray[np.uint8]:
    """Compare the ledger with the plan; return the ids of called reads, as often as they have products."""
    ledger = pq.read_table(workspace.ledger, columns=["read_id", "fate", "reason", "products"])
    report.reads = ledger.num_rows
    recorded = _ids(ledger.column("read_id").to_pylist())
    if has_plan(workspace):
        planned = np.concatenate([np.empty((0, 16), np.uint8), *(reads.read_ids for reads in iterate_reads(workspace))])
        _compare("plan and ledger", planned, recorded, report)
    fates = ledger.column("fate").to_pylist()
    products = ledger.column("products").to_numpy()
    for i, (fate, reason) in enumerate(zip(fates, ledger.column("reason").to_pylist(), strict=True)):
        wrong = (fate == "called") != (products[i] > 0) or (fate != "called") != bool(reason)
        if fate not in ("called", "skipped", "quarantined") or wrong:
            read_id = format_read_id(recorded[i].tobytes())
            report.faults.append(
                f"ledger: read {read_id} is {fate!r} with {products[i]} products and reason {reason!r}"
            )
    called: npt.NDArray[np.uint8] = recorded[products > 0]
    return called


def _compare(what: str, left: npt.NDArray[np.uint8], right: npt.NDArray[np.uint8], report: VerifyReport) -> None:
    proof = prove(left, right)
    for kind, ids in (
        ("only in the first", proof.missing),
        ("only in the second", proof.foreign),
        ("twice", proof.doubled),
    ):
        if len(ids):
            report.faults.append(f"{what}: {len(ids)} reads {kind}, e.g. {format_read_id(ids[0].tobytes())}")


def _fastq_ids(path: Path, report: VerifyReport) -> Iterator[str]:
    """Yield the ids of a FASTQ file; a malformed record is a fault."""
    try:
        with igzip.open(path, "rb") as file:  # type: ignore[no-untyped-call]
            for number, header in enumerate(file):
                sequence, plus, quality = file.readline(), file.readline(), file.readline()
                if header[:1] != b"@" or plus != b"+\n" or len(sequence) != len(quality) or len(sequence) < 2:
                    report.faults.append(f"{path}: record {number} is malformed")
                    return
                yield header[1:].split(None, 1)[0].decode()
    except (OSError, EOFError) as error:
        report.faults.append(f"{path}: can't be decompressed: {error}")


def _summary_ids(path: Path, report: VerifyReport) -> Iterator[str]:
    """Yield the ids of a summary, and check its values."""
    for violation in validate_summary(path):
        report.faults.append(f"{path}: {violation}")
        if len(report.faults) > ENOUGH:
            break
    with path.open(encoding="utf-8", newline="\n") as file:
        header = file.readline().rstrip("\n").split("\t")
        if "read_id" not in header:
            return
        column = header.index("read_id")
        for line in file:
            report.values += len(header)
            yield line.split("\t")[column]


def _hashed(table: Path, report: VerifyReport) -> Iterator[Path]:
    """Check the files that a table of checksums names, and yield them."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = {table.parent / row["file_path"]: row["file_hash"] for row in csv.DictReader(file)}
    for path, expected in rows.items():
        yield path
        report.files += 1
        if not path.exists():
            report.faults.append(f"{path} is named in {table.name} and is not there")
        elif _sha256(path) != expected:
            report.faults.append(f"{path} is not the file that was written: its sha256 differs")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _ids(texts: object) -> npt.NDArray[np.uint8]:
    """Pack ids: uint8, shape (n, 16)."""
    packed = bytearray()
    for text in texts:  # type: ignore[attr-defined]
        packed += bytes.fromhex(text.replace("-", ""))
    return np.frombuffer(bytes(packed), np.uint8).reshape(-1, 16)
