"""Verify: a finished run folder, checked from what lies in it."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from isal import igzip

from tasks.core.errors import InputError
from tasks.core.ledger import id_order, prove
from tasks.formats.bam import iterate_bam
from tasks.formats.bgzf import DeflateError
from tasks.formats.hts import alignment_lengths
from tasks.formats.layout import KINDS, Kind
from tasks.formats.planfile import has_plan, iterate_reads
from tasks.formats.pod5 import format_read_id
from tasks.formats.summary import validate_summary
from tasks.formats.tree import calls_files, sha256
from tasks.formats.workspace import Workspace, read_json

#: Faults listed before verify stops looking for more of a kind.
ENOUGH = 1000

#: Ids of reads, uint8, shape (n, 16), and the bases of each, int64, shape (n,).
_Calls: TypeAlias = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


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

    Holds 24 bytes per read for each of ledger, summary, and one kind of files of calls.
    """
    report = VerifyReport()
    if not workspace.ledger.exists():
        report.faults.append(f"{workspace.ledger} is not there: the run is not complete")
        return report
    called, products = _check_ledger(workspace, report)
    parents = bytearray()
    homes = _homes(workspace, report)
    summaries = sorted(path for home in homes for path in home.rglob("sequencing_summary*.txt"))
    in_summary, lengths = _gathered(call for path in summaries for call in _summary_calls(path, report, parents))
    _check_products(called, products, np.frombuffer(bytes(parents), np.uint8).reshape(-1, 16), report)
    files: list[Path] = []
    for kind in KINDS:
        found = [path for home in homes for path in calls_files(home, [kind])]
        files += found
        if found:
            in_files, bases = _gathered(call for path in found for call in _calls(kind, path, report))
            report.records = max(report.records, len(in_files))
            what = f"{kind.upper()} and summary"
            if _compare(what, in_files, in_summary, report):
                _compare_lengths(what, (in_files, bases), (in_summary, lengths), report)
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


def _compare(what: str, left: npt.NDArray[np.uint8], right: npt.NDArray[np.uint8], report: VerifyReport) -> bool:
    """Tell whether both name the same reads, each once; else say what is wrong."""
    proof = prove(left, right)
    for kind, ids in (
        ("only in the first", proof.missing),
        ("only in the second", proof.foreign),
        ("twice", proof.doubled),
    ):
        if len(ids):
            report.faults.append(f"{what}: {len(ids)} reads {kind}, e.g. {format_read_id(ids[0].tobytes())}")
    return proof.holds


def _compare_lengths(what: str, left: _Calls, right: _Calls, report: VerifyReport) -> None:
    """Compare the bases of the same reads."""
    order = id_order(left[0])
    here, there = left[1][order], right[1][id_order(right[0])]
    differing = np.flatnonzero(here != there)
    for i in differing[:1]:
        report.faults.append(
            f"{what}: {len(differing)} reads are not as long in both, e.g. "
            f"{format_read_id(left[0][order[i]].tobytes())}: {here[i]} and {there[i]} bases"
        )


def _calls(kind: Kind, path: Path, report: VerifyReport) -> Iterator[tuple[bytes, int]]:
    """Yield the ids, packed, and bases of a file of calls; what can't be read is a fault."""
    if kind == "fastq":
        calls = _fastq_calls(path, report)
    elif kind == "bam":
        calls = ((record.read_id, record.bases) for record in iterate_bam(path) if record.primary)
    else:
        calls = alignment_lengths(path)
    try:
        for read_id, bases in calls:
            packed = _packed(read_id)
            if not packed:
                report.faults.append(f"{path}: {read_id!r} is no read id")
                return
            yield packed, bases
    except InputError as error:
        report.faults.append(str(error))
    except UnicodeDecodeError as error:
        report.faults.append(f"{path}: a read id is no text: {error}")


def _fastq_calls(path: Path, report: VerifyReport) -> Iterator[tuple[str, int]]:
    """Yield the ids and bases of a FASTQ file; a malformed record is a fault."""
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
                yield header[1:].split(None, 1)[0].decode(), len(sequence) - 1
    except (OSError, EOFError, DeflateError) as error:
        report.faults.append(f"{path}: can't be decompressed: {error}")


def _summary_calls(path: Path, report: VerifyReport, parents: bytearray) -> Iterator[tuple[bytes, int]]:
    """Yield the ids, packed, and bases of a summary, gather the ids of the parents, and check its values."""
    try:
        yield from _summary_rows(path, report, parents)
    except InputError as error:
        report.faults.append(str(error))
    except (OSError, UnicodeDecodeError) as error:
        report.faults.append(f"{path} can't be read: {error}")


def _summary_rows(path: Path, report: VerifyReport, parents: bytearray) -> Iterator[tuple[bytes, int]]:
    for violation in validate_summary(path):
        report.faults.append(f"{path}: {violation}")
        if len(report.faults) > ENOUGH:
            break
    with path.open(encoding="utf-8", newline="\n") as file:
        header = file.readline().rstrip("\n").split("\t")
        names = ("read_id", "parent_read_id", "sequence_length_template")
        if not set(names) <= set(header):
            return
        column, parent, length = map(header.index, names)
        for line in file:
            report.values += len(header)
            values = line.rstrip("\n").split("\t")
            if len(values) != len(header):
                continue  # a cut line, which is a fault already
            of, read_id = _packed(values[parent]), _packed(values[column])
            if of and read_id:
                parents += of
                bases = values[length]
                yield read_id, int(bases) if bases.isdecimal() and len(bases) < 19 else -1


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


def _gathered(calls: Iterable[tuple[bytes, int]]) -> _Calls:
    """Gather packed ids, uint8, shape (n, 16), and bases, int64, shape (n,)."""
    lengths = array("q")

    def ids() -> Iterator[bytes]:
        for read_id, bases in calls:
            lengths.append(bases)
            yield read_id

    gathered = _ids(ids())
    return gathered, np.frombuffer(lengths, np.int64) if lengths else np.empty(0, np.int64)


def _ids(packed: Iterable[bytes]) -> npt.NDArray[np.uint8]:
    """Gather packed ids: uint8, shape (n, 16)."""
    gathered = bytearray()
    for read_id in packed:
        gathered += read_id
    return np.frombuffer(bytes(gathered), np.uint8).reshape(-1, 16)
