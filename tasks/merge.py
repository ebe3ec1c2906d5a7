"""Merge: plan and committed batches in, one result out, and the proof that every read has one fate.

The ledger comes first: nothing is written into the output tree before each planned read is found, once, in a committed
batch. Merging again, with other choices of files or columns, replaces what an earlier merge made and calls nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core.calls import Fate
from tasks.core.errors import LedgerError
from tasks.core.ledger import prove
from tasks.core.plan import Plan, PlannedReads
from tasks.core.result import MergedRun
from tasks.engines.registry import identify
from tasks.formats import layout
from tasks.formats.bgzf import join
from tasks.formats.commit import FATES, committed_ids, read_manifest
from tasks.formats.planfile import input_file_table, iterate_reads, read_id_bytes, read_id_text, read_plan
from tasks.formats.pod5 import format_read_id
from tasks.formats.summary import write_summary
from tasks.formats.workspace import Workspace, fsync_folder, read_json, write_json, write_text
from tasks.metrics import StageFigures, add_up
from tasks.report import provenance
from tasks.settings import OutputSettings, RunSettings

LEDGER = pa.schema(
    [
        ("read_id", pa.string()),
        ("run_id", pa.string()),
        ("file", pa.string()),
        ("row", pa.uint32()),
        ("samples", pa.int64()),
        ("fate", pa.string()),
        ("reason", pa.string()),
        ("products", pa.int32()),
        ("bases", pa.int64()),
        ("batch", pa.string()),
        ("attempt", pa.string()),
    ]
)


def merge(settings: RunSettings) -> MergedRun:
    """Prove the ledger, and write the result into the run folder.

    Raises:
        LedgerError: reads are missing or doubled; names them. Nothing is written then.
    """
    workspace = Workspace(settings.out)
    identity = identify(settings.engine)
    plan = read_plan(workspace)
    done = committed_ids(workspace)
    left = [batch for batch in plan.batches if batch.batch_id not in done]
    if left:
        raise LedgerError(
            f"{sum(batch.reads for batch in left)} reads in {len(left)} of {len(plan.batches)} batches are not called "
            f"yet, e.g. of {left[0].slices[0].file} (batch {left[0].batch_id}); the same `shoal run` goes on"
        )
    manifests = [read_manifest(workspace, batch.batch_id) for batch in plan.batches]
    workspace.merged.unlink(missing_ok=True)  # from here on the result is not whole, until it is written again
    fates = write_ledger(workspace, plan, manifests)
    _remove_earlier(workspace)
    tree = _Tree(workspace, plan, manifests, settings.output, rehearsal=identity.engine == "null")
    tree.write()
    input_file_table(plan.files, workspace.input_files)
    metrics: dict[str, StageFigures] = {}
    for manifest in manifests:
        add_up(metrics, manifest["metrics"])
    merged = MergedRun(
        out=str(workspace.out),
        folders=tuple(tree.folders),
        reads=sum(fates.values()),
        called=fates[Fate.CALLED.value],
        skipped=fates[Fate.SKIPPED.value],
        quarantined=fates[Fate.QUARANTINED.value],
        records=tree.records[True] + tree.records[False],
        passed=tree.records[True],
        bases=sum(manifest["bases"] for manifest in manifests),
        files=len(plan.files),
        files_not_whole=sum(file.status != "ok" for file in plan.files),
    )
    write_json(
        workspace.provenance,
        {
            **provenance(settings, identity),
            "result": asdict(merged),
            "batches": len(plan.batches),
            "calling_began": min((manifest["began"] for manifest in manifests), default=None),
            "calling_ended": max((manifest["ended"] for manifest in manifests), default=None),
            "workers": sorted({manifest["worker"] for manifest in manifests}),
            "metrics": metrics,
        },
    )
    write_json(workspace.merged, {"result": asdict(merged), "written": tree.written, "plan": len(plan.batches)})
    fsync_folder(workspace.state)
    return merged


def merged_before(workspace: Workspace) -> MergedRun | None:
    """Return what the last merge made, when it is of all batches that the plan has now; else None."""
    merged = read_json(workspace.merged)
    if merged is None or merged["plan"] != len(read_plan(workspace).batches):
        return None
    return MergedRun(**{**merged["result"], "folders": tuple(merged["result"]["folders"])})


def write_ledger(workspace: Workspace, plan: Plan, manifests: list[dict[str, Any]]) -> Counter[str]:
    """Write one row per planned read, in input order, and prove it against the plan; return the count of each fate.

    Memory: the ids of plan and ledger, 32 bytes per read, and as much again while they are compared.
    """
    target = workspace.ledger.with_name(".ledger.parquet.new")
    fates: Counter[str] = Counter()
    planned_ids: list[npt.NDArray[np.uint8]] = []
    recorded_ids: list[npt.NDArray[np.uint8]] = []
    parts = _Parts(workspace, plan, manifests)
    with pq.ParquetWriter(target, LEDGER, compression="zstd") as writer:
        for reads in iterate_reads(workspace):
            planned_ids.append(reads.read_ids)
            table, ids = _ledger_rows(plan, reads, parts)
            recorded_ids.append(ids)
            counted = table.column("fate").value_counts()
            fates.update({row["values"]: row["counts"] for row in counted.to_pylist()})
            writer.write_table(table)
    proof = prove(_stacked(planned_ids), _stacked(recorded_ids))
    if not proof.holds or parts.left_over():
        named = [
            f"{len(ids)} {what}, e.g. {format_read_id(ids[0].tobytes())}"
            for what, ids in (
                ("missing", proof.missing),
                ("doubled", proof.doubled),
                ("not in the plan", proof.foreign),
            )
            if len(ids)
        ]
        target.unlink()
        raise LedgerError(
            f"the ledger does not hold: {proof.planned} reads planned, {proof.recorded} recorded; {'; '.join(named)}"
        )
    target.replace(workspace.ledger)
    return fates


class _Parts:
    """The committed batches' own ledgers, taken row by row in the plan's order; a few are held at a time."""

    def __init__(self, workspace: Workspace, plan: Plan, manifests: list[dict[str, Any]]) -> None:
        self._workspace = workspace
        self._plan = plan
        self._manifests = manifests
        self._open: dict[int, Any] = {}
        self._taken: Counter[int] = Counter()

    def attempt(self, batch: int) -> str:
        return str(self._manifests[batch]["attempt"])

    def take(self, batch: int, rows: int) -> Any:
        """Return the next rows of a batch's ledger; fewer when it has no more."""
        if batch not in self._open:
            folder = self._workspace.committed / self._plan.batches[batch].batch_id
            self._open[batch] = pq.read_table(folder / FATES)
        part = self._open[batch].slice(self._taken[batch], rows)
        self._taken[batch] += part.num_rows
        if self._taken[batch] >= self._open[batch].num_rows:
            del self._open[batch]
        return part

    def left_over(self) -> bool:
        """Tell whether a batch's ledger has rows that nobody took."""
        return bool(self._open)


def _ledger_rows(plan: Plan, reads: PlannedReads, parts: _Parts) -> tuple[Any, npt.NDArray[np.uint8]]:
    """Make the ledger's rows of some planned reads, and return the ids as the batches recorded them."""
    order = np.argsort(reads.batch, kind="stable")
    numbers, counts = np.unique(reads.batch, return_counts=True)
    pieces, kept = [], []
    at = 0
    for batch, count in zip(numbers.tolist(), counts.tolist(), strict=True):
        rows = order[at : at + count]
        at += count
        if batch < 0:
            pieces.append(_refused_rows(plan, reads, rows))
            kept.append(rows)
            continue
        part = parts.take(batch, count)
        pieces.append(
            pa.table(
                {
                    "read_id": part.column("read_id"),
                    "fate": part.column("fate"),
                    "reason": part.column("reason"),
                    "products": part.column("products"),
                    "bases": part.column("bases"),
                    "batch": pa.array([plan.batches[batch].batch_id] * part.num_rows, pa.string()),
                    "attempt": pa.array([parts.attempt(batch)] * part.num_rows, pa.string()),
                }
            )
        )
        kept.append(rows[: part.num_rows])
    places = np.concatenate(kept)
    joined = pa.concat_tables(pieces).take(pa.array(np.argsort(places, kind="stable")))
    places = np.sort(places)
    ids = read_id_bytes(joined)
    columns = {
        "read_id": read_id_text(ids),
        "run_id": _named(reads.run[places], [run.info.acquisition_id for run in plan.runs]),
        "file": _named(reads.file[places], [file.path for file in plan.files]),
        "row": pa.array(reads.row[places], pa.uint32()),
        "samples": pa.array(reads.num_samples[places], pa.int64()),
        **{
            name: joined.column(name).combine_chunks()
            for name in ("fate", "reason", "products", "bases", "batch", "attempt")
        },
    }
    return pa.table([pa.array(columns[field.name]).cast(field.type) for field in LEDGER], LEDGER), ids


def _refused_rows(plan: Plan, reads: PlannedReads, rows: npt.NDArray[np.int64]) -> Any:
    reasons = [f"wrong_chemistry: {run.refused}" for run in plan.runs]
    count = len(rows)
    return pa.table(
        {
            "read_id": pa.array([row.tobytes() for row in reads.read_ids[rows]], pa.binary(16)),
            "fate": pa.array([Fate.SKIPPED.value] * count, pa.string()),
            "reason": pa.array([reasons[run] for run in reads.run[rows].tolist()], pa.string()),
            "products": pa.array(np.zeros(count), pa.int32()),
            "bases": pa.array(np.zeros(count), pa.int64()),
            "batch": pa.array([""] * count, pa.string()),
            "attempt": pa.array([""] * count, pa.string()),
        }
    )


def _named(numbers: npt.NDArray[np.integer[Any]], names: list[str]) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array(numbers.astype(np.int32)), pa.array(names, pa.string()))


def _stacked(parts: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    return np.concatenate([np.empty((0, 16), np.uint8), *parts])


class _Tree:
    """MinKNOW's tree of folders and files, for each run."""

    def __init__(
        self,
        workspace: Workspace,
        plan: Plan,
        manifests: list[dict[str, Any]],
        output: OutputSettings,
        *,
        rehearsal: bool,
    ) -> None:
        self._workspace = workspace
        self._plan = plan
        self._manifests = manifests
        self._output = output
        self._marker = "null" if rehearsal else ""
        #: Folders of the runs, relative to the output folder.
        self.folders: list[str] = []
        #: Files made, relative to the output folder.
        self.written: list[str] = []
        #: FASTQ records that pass and that don't.
        self.records = {True: 0, False: 0}

    def write(self) -> None:
        """Write every run that has anything called."""
        for number, run in enumerate(self._plan.runs):
            batches = [
                (batch.batch_id, manifest)
                for batch, manifest in zip(self._plan.batches, self._manifests, strict=True)
                if any(part["run"] == number for part in manifest["files"].values())
            ]
            if batches:
                self._write_run(number, run.info, batches)

    def _write_run(self, number: int, run: Any, batches: list[tuple[str, dict[str, Any]]]) -> None:
        folder = self._own_folder(str(layout.run_folder(run)))
        home = self._workspace.out / folder
        home.mkdir(parents=True, exist_ok=True)
        names: dict[Path, dict[bool, str]] = {}
        hashes: list[tuple[str, str]] = []
        fastqs: dict[bool, list[Path]] = {True: [], False: []}
        for ordinal, (batch_id, manifest) in enumerate(batches):
            source = self._workspace.committed / batch_id
            here: dict[bool, str] = {}
            for name, part in manifest["files"].items():
                if part["run"] != number:
                    continue
                passes = part["passes"]
                self.records[passes] += part["records"]
                fastqs[passes].append(source / name)
                at = ordinal if self._output.files == "many" else 0
                here[passes] = str(layout.fastq_name(run, passes=passes, batch=at, marker=self._marker))
                if self._output.files == "many":
                    self._link(source / name, home / here[passes])
                    hashes.append((part["sha256"], here[passes]))
            names[source / f"run{number}.summary.parquet"] = {
                verdict: Path(here.get(verdict, "")).name for verdict in (True, False)
            }
        if self._output.files == "one":
            for passes, parts in fastqs.items():
                if parts:
                    name = str(layout.fastq_name(run, passes=passes, batch=0, marker=self._marker))
                    hashes.append((self._join(parts, home / name), name))
        summary = home / layout.summary_name(run, marker=self._marker)
        write_summary(names, self._output.summary, summary)
        self.written.append(str(summary.relative_to(self._workspace.out)))
        final = home / layout.final_summary_name(run)
        ended = max(manifest["ended"] for _, manifest in batches)
        write_text(
            final, layout.final_summary(run, summary=summary.name, fastq_files=len(hashes), processing_stopped=ended)
        )
        hashed = home / layout.output_hash_name(run)
        write_text(hashed, layout.output_hash(run, hashes))
        self.written += [str(path.relative_to(self._workspace.out)) for path in (final, hashed)]

    def _own_folder(self, wanted: str) -> str:
        """Give each run a folder of its own, also where missing metadata makes two the same."""
        folder, n = wanted, 1
        while folder in self.folders:
            n += 1
            folder = f"{wanted}-{n}"
        self.folders.append(folder)
        return folder

    def _link(self, source: Path, target: Path) -> None:
        """Make a file appear in the tree at no cost; where links are refused, copy it."""
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:
            _replace(target, lambda file: _copy(source, file))
        self.written.append(str(target.relative_to(self._workspace.out)))

    def _join(self, parts: list[Path], target: Path) -> str:
        """Join BGZF files without recompression; return the sha256 of the result, hex."""
        target.parent.mkdir(exist_ok=True)
        _replace(target, lambda file: join(parts, file))
        self.written.append(str(target.relative_to(self._workspace.out)))
        with target.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


def _replace(target: Path, fill: Callable[[BinaryIO], object]) -> None:
    new = target.with_name(f".{target.name}.new")
    with new.open("wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(target)


def _copy(source: Path, file: BinaryIO) -> None:
    with source.open("rb") as opened:
        shutil.copyfileobj(opened, file, 1 << 20)


def _remove_earlier(workspace: Workspace) -> None:
    """Remove the FASTQ files and tables of an earlier merge, so that none stands beside this one's."""
    for path in _earlier(workspace):
        path.unlink(missing_ok=True)


def _earlier(workspace: Workspace) -> Iterator[Path]:
    """Find what earlier merges, whole or cut off, put into the tree: links to or joins of our batches, and tables."""
    for run in read_plan(workspace).runs:
        wanted = workspace.out / layout.run_folder(run.info)
        for home in wanted.parent.glob(f"{wanted.name}*"):
            for pattern in ("fastq_pass/*.fastq.gz", "fastq_fail/*.fastq.gz", "sequencing_summary*.txt"):
                yield from home.glob(pattern)
