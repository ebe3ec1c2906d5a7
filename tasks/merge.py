"""Merge: plan and committed batches in, one result out, and the proof that every read has one fate.

The ledger comes first: nothing is written into the output tree before each planned read is found, once, in a committed
batch. Merging again, with other choices of files or columns, replaces what an earlier merge made and calls nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core.calls import EngineIdentity, Fate
from tasks.core.errors import InputError, LedgerError
from tasks.core.ledger import prove
from tasks.core.plan import Plan, PlannedReads
from tasks.core.result import MergedRun
from tasks.engines.registry import identify
from tasks.formats.commit import FATES, committed_ids, read_manifest
from tasks.formats.planfile import (
    input_file_table,
    iterate_reads,
    read_id_bytes,
    read_id_text,
    read_plan,
    read_plan_digest,
)
from tasks.formats.pod5 import format_read_id
from tasks.formats.reference import refuse_for_cram
from tasks.formats.resort import read_choice, sorted_batches
from tasks.formats.tree import Tree, names_written, refuse_foreign
from tasks.formats.workspace import Workspace, fsync_path, read_json, write_json
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

#: Fields of the output that merge alone goes by: with others, nothing is called again.
MERGED_BY = ("files", "summary", "formats", "barcoding_summary")


def merge(settings: RunSettings) -> MergedRun:
    """Prove the ledger, and write the result into the run folder.

    Raises:
        LedgerError: reads are missing or doubled; names them. Nothing is written then.
        SettingsError: the folder has calls that are not ours since it was launched, or CRAM can't be compressed against
            the reference. Nothing is written then.
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
    refuse_foreign(workspace, plan)
    if "cram" in settings.output.formats and settings.output.reference:
        refuse_for_cram(settings.output.reference)
    earlier = names_written(workspace)
    manifests = [read_manifest(workspace, batch.batch_id) for batch in plan.batches]
    identity = _called_by(manifests) or identity
    workspace.merged.unlink(missing_ok=True)  # from here on the result is not whole, until it is written again
    fates = write_ledger(workspace, plan, manifests)
    choice = read_choice(workspace)
    batches = sorted_batches(workspace, plan, manifests, choice)
    tree = Tree(workspace.out, plan, batches, settings.output, marker="null" if identity.engine == "null" else "")
    # On disk before any of them is made or removed: what a crash leaves in the tree is then known to be ours.
    write_json(workspace.written, sorted({*earlier, *tree.names}))
    fsync_path(workspace.state)
    _remove(workspace, earlier)
    tree.write()
    write_json(workspace.written, sorted(tree.names))
    files = workspace.input_files.with_name(".input_files.parquet.new")
    input_file_table(plan.files, files)
    fsync_path(files)
    files.replace(workspace.input_files)
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
            **({"sorted_again": choice.as_json()} if choice else {}),
            "result": asdict(merged),
            "batches": len(plan.batches),
            "calling_began": min((manifest["began"] for manifest in manifests), default=None),
            "calling_ended": max((manifest["ended"] for manifest in manifests), default=None),
            "workers": sorted({manifest["worker"] for manifest in manifests}),
            "metrics": metrics,
        },
    )
    fsync_path(workspace.out)
    write_json(workspace.merged, {"result": asdict(merged), "plan": read_plan_digest(workspace)})
    fsync_path(workspace.state)
    return merged


def merged_before(workspace: Workspace, digest: str | None = None) -> MergedRun | None:
    """Return what the last merge made, when it is of the plan as it is now; else None.

    Args:
        digest: Of another plan, which the result may be of; none: of the one in the run folder.
    """
    try:
        merged = read_json(workspace.merged)
    except InputError:  # merging again mends it
        return None
    if merged is None or merged["plan"] != (digest or read_plan_digest(workspace)):
        return None
    return MergedRun(**{**merged["result"], "folders": tuple(merged["result"]["folders"])})


def merged_by(workspace: Workspace, output: OutputSettings) -> bool:
    """Tell whether the last merge made the files and columns that settings ask for."""
    try:
        made = read_json(workspace.provenance)
    except InputError:
        return False
    if made is None:
        return False
    before = {**OutputSettings().model_dump(mode="json"), **made["settings"]["output"]}  # an older version's lacks some
    now = output.model_dump(mode="json")
    return all(before[name] == now[name] for name in MERGED_BY)


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
    fsync_path(target)
    target.replace(workspace.ledger)
    return fates


#: Tables that are held before they are joined into one: the smallest takes 8 kB.
PIECES = 500


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
    if not len(reads.batch):  # no file of the input has a read that can be read
        return LEDGER.empty_table(), reads.read_ids
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
        if len(pieces) == PIECES:
            pieces = [pa.concat_tables(pieces).combine_chunks()]
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


def _called_by(manifests: list[dict[str, Any]]) -> EngineIdentity | None:
    """Return what the engine said of itself when it called; more than settings tell, where it chooses its model.

    Batches without a call may have been committed before it had chosen.
    """
    told = [manifest for manifest in manifests if manifest["products"]] or manifests
    values = told[0].get("engine") if told else None
    if values is None:  # called by a version that did not write it down
        return None
    return EngineIdentity(**{**values, "modified_base_models": tuple(values["modified_base_models"])})


def _remove(workspace: Workspace, names: Iterable[str]) -> None:
    """Remove what an earlier merge made, or was about to, so that none of it stands beside this one's; only that."""
    for path in (workspace.out / name for name in names):
        path.unlink(missing_ok=True)
        if path.suffix in (".sam", ".cram"):  # what it was being converted from
            path.with_name(f".{path.name}.bam").unlink(missing_ok=True)
        for folder in (path.parent, path.parent.parent):  # of a barcode, of a verdict
            if folder.name.endswith(("_pass", "_fail")) or folder.parent.name.endswith(("_pass", "_fail")):
                with suppress(OSError):
                    folder.rmdir()
