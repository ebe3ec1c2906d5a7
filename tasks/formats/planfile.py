"""The plan on disk: parquet tables in `.shoal/plan`, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core.batches import Batch, Slice
from tasks.core.errors import SettingsError
from tasks.core.plan import Plan, PlannedFile, PlannedReads, PlannedRun
from tasks.core.reads import RunInfo
from tasks.formats.workspace import Workspace, fsync_path, read_json, write_json


def write_plan(workspace: Workspace, plan: Plan, reads: PlannedReads) -> None:
    """Write a plan where there is none, or replace one by a longer one."""
    new = workspace.state / f"plan.{os.getpid()}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write_json(new / "runs.json", [_run_json(run) for run in plan.runs])
    write_json(new / "digest.json", plan_digest(plan, reads))
    input_file_table(plan.files, new / "files.parquet")
    pq.write_table(
        pa.Table.from_pylist([asdict(batch) for batch in plan.batches], BATCHES),
        new / "batches.parquet",
        row_group_size=256,
    )
    pq.write_table(
        pa.table(
            {
                "read_id": _binary(reads.read_ids),
                "num_samples": reads.num_samples,
                "run": reads.run,
                "file": reads.file,
                "row": reads.row,
                "batch": reads.batch,
            }
        ),
        new / "reads.parquet",
        row_group_size=1 << 17,
    )
    for file in new.iterdir():
        fsync_path(file)
    fsync_path(new)
    old = workspace.state / f"plan.{os.getpid()}.old"
    if workspace.plan.exists():
        workspace.plan.rename(old)
    new.rename(workspace.plan)
    fsync_path(workspace.state)
    shutil.rmtree(old, ignore_errors=True)


def _folder(workspace: Workspace) -> Path:
    """Return where the plan lies: for a moment, or after a crash in `write_plan`, that is aside."""
    if not workspace.plan.exists():
        for old in workspace.state.glob("plan.*.old"):
            return old
    return workspace.plan


def has_plan(workspace: Workspace) -> bool:
    """Tell whether the run folder has a plan."""
    return (_folder(workspace) / "reads.parquet").exists()


def read_plan(workspace: Workspace) -> Plan:
    """Read runs, files and batches; the reads come from `read_planned_reads` or `iterate_reads`.

    Raises:
        SettingsError: there is none.
    """
    folder = _folder(workspace)
    runs = read_json(folder / "runs.json")
    if runs is None:
        raise SettingsError(f"{workspace.out} holds no plan yet; `shoal run INPUT --out {workspace.out}` makes one")
    return Plan(
        runs=tuple(map(_run_from_json, runs)),
        files=tuple(PlannedFile(**row) for row in pq.read_table(folder / "files.parquet").to_pylist()),
        batches=tuple(_batch(row) for row in pq.read_table(folder / "batches.parquet").to_pylist()),
    )


def plan_digest(plan: Plan, reads: PlannedReads) -> str:
    """Return sha256 over what a result is a result of: the reads, and every file of the input with what became of it.

    The order of the files is left out: it is that in which they were named.
    """
    digest = hashlib.sha256(np.ascontiguousarray(reads.read_ids).data)
    files = sorted((file.path, file.size, file.reason) for file in plan.files)
    digest.update(json.dumps(files).encode())
    return digest.hexdigest()


def read_plan_digest(workspace: Workspace) -> str:
    """Return the digest of a run folder's plan; it was made with the plan, for reading all reads takes seconds."""
    stored = read_json(_folder(workspace) / "digest.json")
    if stored is None:  # planned by an older version
        return plan_digest(read_plan(workspace), read_planned_reads(workspace))
    return str(stored)


def read_planned_reads(workspace: Workspace) -> PlannedReads:
    """Read all planned reads: about 40 bytes each."""
    return _planned_reads(pq.read_table(_folder(workspace) / "reads.parquet"))


def iterate_reads(workspace: Workspace) -> Iterator[PlannedReads]:
    """Stream the planned reads in input order, some hundred thousand at a time."""
    with pq.ParquetFile(_folder(workspace) / "reads.parquet") as file:
        for group in range(file.num_row_groups):
            yield _planned_reads(file.read_row_group(group))


_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_DIGIT_PLACES = [place for place in range(36) if place not in (8, 13, 18, 23)]

FILES = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("reads", pa.int64()),
        ("samples", pa.int64()),
        ("duplicates", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
    ]
)
BATCHES = pa.schema(
    [
        ("number", pa.int32()),
        ("batch_id", pa.string()),
        ("reads", pa.int64()),
        ("samples", pa.int64()),
        ("slices", pa.list_(pa.struct([("file", pa.string()), ("start", pa.int64()), ("stop", pa.int64())]))),
    ]
)


def _binary(read_ids: npt.NDArray[np.uint8]) -> Any:
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), len(read_ids), [None, pa.py_buffer(np.ascontiguousarray(read_ids))]
    )


def read_id_bytes(table: Any) -> npt.NDArray[np.uint8]:
    """Return the `read_id` column of a table, uint8, shape (rows, 16)."""
    column = table.column("read_id").combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # of no or several chunks
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.binary(16))
    flat = np.frombuffer(column.buffers()[1] or b"", np.uint8)
    return flat[16 * column.offset : 16 * (column.offset + len(column))].reshape(-1, 16)


def read_id_text(read_ids: npt.NDArray[np.uint8]) -> Any:
    """Return ids as a string array of lower-case UUIDs with dashes; `read_ids`: uint8, shape (rows, 16)."""
    count = len(read_ids)
    text = np.full((count, 36), ord("-"), np.uint8)
    digits = np.stack((_HEX[read_ids >> 4], _HEX[read_ids & 15]), axis=2).reshape(count, 32)
    text[:, _DIGIT_PLACES] = digits
    offsets = np.arange(0, 36 * (count + 1), 36, dtype=np.int32)
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(text))


def _planned_reads(table: Any) -> PlannedReads:
    return PlannedReads(
        read_ids=read_id_bytes(table),
        num_samples=table.column("num_samples").to_numpy(),
        run=table.column("run").to_numpy(),
        file=table.column("file").to_numpy(),
        row=table.column("row").to_numpy(),
        batch=table.column("batch").to_numpy(),
    )


def _batch(row: dict[str, Any]) -> Batch:
    return Batch(**{**row, "slices": tuple(Slice(**part) for part in row["slices"])})


def _run_json(run: PlannedRun) -> dict[str, Any]:
    info = asdict(run.info)
    for key in ("acquisition_start_time", "protocol_start_time"):
        info[key] = info[key].isoformat() if info[key] else None
    return {"info": info, "reads": run.reads, "samples": run.samples, "refused": run.refused}


def _run_from_json(value: dict[str, Any]) -> PlannedRun:
    info = dict(value["info"])
    for key in ("acquisition_start_time", "protocol_start_time"):
        info[key] = datetime.fromisoformat(info[key]) if info[key] else None
    for key in ("context_tags", "tracking_id"):
        info[key] = tuple((name, text) for name, text in info[key])
    return PlannedRun(info=RunInfo(**info), reads=value["reads"], samples=value["samples"], refused=value["refused"])


def read_reads_of(workspace: Workspace, numbers: tuple[int, ...]) -> PlannedReads:
    """Read the planned reads of some batches, one batch after another as they are numbered, each in its own order."""
    table = pq.read_table(_folder(workspace) / "reads.parquet", filters=[("batch", "in", list(numbers))])
    return _planned_reads(table.take(pa.array(np.argsort(table.column("batch").to_numpy(), kind="stable"))))


def remove_unfinished(workspace: Workspace) -> None:
    """Put right what a crash in `write_plan` left: an old plan moved aside comes back, half a new one goes.

    Only for the one flow that owns the run folder: what looks left over may be another's that is writing.
    """
    for old in workspace.state.glob("plan.*.old"):
        if workspace.plan.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(workspace.plan)
    for new in workspace.state.glob("plan.*.new"):
        shutil.rmtree(new, ignore_errors=True)


def input_file_table(files: tuple[PlannedFile, ...], target: Path) -> None:
    """Write the ledger's file table."""
    pq.write_table(pa.Table.from_pylist([asdict(file) for file in files], FILES), target)


def read_batches(workspace: Workspace, numbers: tuple[int, ...]) -> tuple[Batch, ...]:
    """Read some batches of the plan, by their numbers."""
    table = pq.read_table(_folder(workspace) / "batches.parquet", filters=[("number", "in", list(numbers))])
    return tuple(_batch(row) for row in table.to_pylist())
