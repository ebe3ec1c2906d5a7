"""Verify: a finished run folder, checked from what lies in it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from isal import igzip

from tasks.core.errors import InputError
from tasks.core.ledger import prove
from tasks.formats.bam import iterate_bam
from tasks.formats.bgzf import DeflateError
from tasks.formats.hts import alignment_ids
from tasks.formats.layout import KINDS, Kind
from tasks.formats.planfile import has_plan, iterate_reads
from tasks.formats.pod5 import format_read_id
from tasks.formats.summary import validate_summary
from tasks.formats.tree import calls_files, sha256
from tasks.formats.workspace import Workspace, read_json

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
    """Check a run folder: ledger against plan, summary against ledger, calls against summary, values, checksums.

    Holds 16 bytes per read for each of ledger, summary, and one kind of files of calls.
    """
    report = VerifyReport()
    if not workspace.ledger.exists():
        report.faults.append(f"{workspace.ledger} is not there: the run is not complete")
        return report
    called, products = _check_ledger(workspace, report)
    parents = bytearray()
    homes = _homes(workspace, report)
    summaries = sorted(path for home in homes for path in home.rglob("sequencing_summary*.txt"))
    in_summary = _ids(read_id for path in summaries for read_id in _summary_ids(path, report, parents))
    _check_products(called, products, np.frombuffer(bytes(parents), np.uint8).reshape(-1, 16), report)
    files: list[Path] = []
    for kind in KINDS:
        found = [path for home in homes for path in calls_files(home, [kind])]
        files += found
        if found:
            in_files = _ids(read_id for path in found for read_id in _calls(kind, path, report))
            report.records = max(report.records, len(in_files))
            _compare(f"{kind.upper()} and summary", in_files, in_summary, report)
    if len(in_summary) and not files:
        report.faults.append(f"{workspace.out} has no file of calls, and {len(in_summary)} reads in its summaries")
    tables = sorted(path for home in homes for path in home.rglob("output_hash*.csv"))
    named = {path for table in tables for path in _hashed(table, report)}
    report.faults += [f"{path} is named in no output_hash table" for path in files if path not in named]
    return report


def _homes(workspace: Workspace, report: VerifyReport) -> list[Path]:
    """List the folders that the last merge made: another run's output may lie below ours."""
    try:
        made = read_json(workspace.provenance)
    except InputError as error:
        report.faults.append(f"{error}; `shoal merge {workspace.out}` writes it anew")
        return [workspace.out]
    return [workspace.out / folder for folder in made["result"]["folders"]] if made else [workspace.out]


def _check_ledger(
    workspace: Workspace, report: VerifyReport
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer[Any]]]:
    """Compare the ledger with the plan; return the ids of called reads and how many products each has."""
    try:
        ledger = pq.read_table(workspace.ledger, columns=["read_id", "fate", "reason", "products"])
        recorded = _ids(map(_packed, ledger.column("read_id").to_pylist()))
        if len(recorded) != ledger.num_rows:
            raise ValueError(f"{ledger.num_rows - len(recorded)} of its read ids are none")
    except (OSError, ValueError) as error:  # pyarrow's own are of these
        report.faults.append(f"{workspace.ledger} can't be read: {error}")
        return np.empty((0, 16), np.uint8), np.empty(0, np.int32)
    report.reads = ledger.num_rows
    if has_plan(workspace):
        nothing = np.empty((0, 16), np.uint8)
        try:
            planned = np.concatenate([nothing, *(reads.read_ids for reads in iterate_reads(workspace))])
        except (OSError, ValueError) as error:
            report.faults.append(f"{workspace.plan} can't be read: {error}")
        else:
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
    return recorded[products > 0], products[products > 0]


def _check_products(
    called: npt.NDArray[np.uint8],
    products: npt.NDArray[np.integer[Any]],
    parents: npt.NDArray[np.uint8],
    report: VerifyReport,
) -> None:
    """Compare the ledger with the parents that the summaries name, each as often as it has products."""
    found, counts = np.unique(parents, axis=0, return_counts=True)
    _compare("ledger and summary", called, found, report)
    order = np.lexsort(called.T[::-1])
    if len(found) == len(called) and (found == called[order]).all():
        for i in np.flatnonzero(counts != products[order])[:1]:
            read_id = format_read_id(found[i].tobytes())
            report.faults.append(
                f"ledger and summary: read {read_id} has {products[order][i]} products in the ledger, {counts[i]} rows"
            )


def _compare(what: str, left: npt.NDArray[np.uint8], right: npt.NDArray[np.uint8], report: VerifyReport) -> None:
    proof = prove(left, right)
    for kind, ids in (
        ("only in the first", proof.missing),
        ("only in the second", proof.foreign),
        ("twice", proof.doubled),
    ):
        if len(ids):
            report.faults.append(f"{what}: {len(ids)} reads {kind}, e.g. {format_read_id(ids[0].tobytes())}")


def _calls(kind: Kind, path: Path, report: VerifyReport) -> Iterator[bytes]:
    """Yield the ids of a file of calls, packed; what can't be read is a fault."""
    if kind == "fastq":
        ids = _fastq_ids(path, report)
    elif kind == "bam":
        ids = (record.read_id for record in iterate_bam(path) if record.primary)
    else:
        ids = alignment_ids(path)
    try:
        for read_id in ids:
            packed = _packed(read_id)
            if not packed:
                report.faults.append(f"{path}: {read_id!r} is no read id")
                return
            yield packed
    except InputError as error:
        report.faults.append(str(error))
    except UnicodeDecodeError as error:
        report.faults.append(f"{path}: a read id is no text: {error}")


def _fastq_ids(path: Path, report: VerifyReport) -> Iterator[str]:
    """Yield the ids of a FASTQ file; a malformed record is a fault."""
    try:
        with igzip.open(path, "rb") as file:  # type: ignore[no-untyped-call]
            for number, header in enumerate(file):
                sequence, plus, quality = file.readline(), file.readline(), file.readline()
                if (
                    header[:1] != b"@"
                    or plus != b"+\n"
                    or len(sequence) != len(quality)
                    or len(sequence) < 2
                    or not header[1:2].strip()
                ):
                    report.faults.append(f"{path}: record {number} is malformed")
                    return
                yield header[1:].split(None, 1)[0].decode()
    except (OSError, EOFError, DeflateError) as error:
        report.faults.append(f"{path}: can't be decompressed: {error}")


def _summary_ids(path: Path, report: VerifyReport, parents: bytearray) -> Iterator[bytes]:
    """Yield the ids of a summary, packed, gather those of the parents, and check its values."""
    try:
        yield from _summary_rows(path, report, parents)
    except InputError as error:
        report.faults.append(str(error))
    except (OSError, UnicodeDecodeError) as error:
        report.faults.append(f"{path} can't be read: {error}")


def _summary_rows(path: Path, report: VerifyReport, parents: bytearray) -> Iterator[bytes]:
    for violation in validate_summary(path):
        report.faults.append(f"{path}: {violation}")
        if len(report.faults) > ENOUGH:
            break
    with path.open(encoding="utf-8", newline="\n") as file:
        header = file.readline().rstrip("\n").split("\t")
        if not {"read_id", "parent_read_id"} <= set(header):
            return
        column, parent = header.index("read_id"), header.index("parent_read_id")
        for line in file:
            report.values += len(header)
            values = line.rstrip("\n").split("\t")
            if len(values) != len(header):
                continue  # a cut line, which is a fault already
            of, read_id = _packed(values[parent]), _packed(values[column])
            if of and read_id:
                parents += of
                yield read_id


def _hashed(table: Path, report: VerifyReport) -> Iterator[Path]:
    """Check the files that a table of checksums names, and yield them."""
    rows = {}
    try:
        with table.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                rows[table.parent / row["file_path"]] = row["file_hash"]
    except (OSError, UnicodeDecodeError, KeyError, TypeError, csv.Error) as error:  # of a cut table, too
        report.faults.append(f"{table} can't be read after {len(rows)} rows: {error!r}")
    for path, expected in rows.items():
        yield path
        report.files += 1
        if not path.is_file():
            report.faults.append(f"{path} is named in {table.name} and is not there")
            continue
        try:
            found = sha256(path)
        except OSError as error:
            report.faults.append(f"{path} can't be read: {error}")
            continue
        if found != expected:
            report.faults.append(f"{path} is not the file that was written: its sha256 differs")


def _packed(text: str) -> bytes:
    """Return a read id's 16 bytes; none of what is no read id."""
    try:
        packed = bytes.fromhex(text.replace("-", ""))
    except ValueError:
        return b""
    return packed if len(packed) == 16 else b""


def _ids(packed: Iterable[bytes]) -> npt.NDArray[np.uint8]:
    """Gather packed ids: uint8, shape (n, 16)."""
    gathered = bytearray()
    for read_id in packed:
        gathered += read_id
    return np.frombuffer(bytes(gathered), np.uint8).reshape(-1, 16)
