"""Sorting again: other verdicts and names of barcodes for what is called already, without calling it again.

The committed batches stay as they are. What is sorted otherwise lies beside them, one folder per batch, made whole or
not at all, and merge takes the one or the other; so a choice can be changed and taken back, and batches committed after
it are sorted by it too.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import polars as pl
from isal import igzip

from tasks.core.calls import Barcode
from tasks.core.errors import InputError
from tasks.core.plan import Plan
from tasks.core.reads import RunInfo
from tasks.formats.bam import barcode_group_line, group_id, iterate_bam, read_header, records_in
from tasks.formats.commit import MANIFEST, committed_ids, read_manifest
from tasks.formats.fastq import barcode_label, renamed_header, word
from tasks.formats.layout import path_part
from tasks.formats.outputs import CallFile, Place, Staged, summary_part
from tasks.formats.samplesheet import SampleSheet
from tasks.formats.tree import SortedBatch
from tasks.formats.workspace import Workspace, fsync_path, read_json, write_json

#: Calls that are compressed at once.
TOGETHER = 64
#: Verdict and folder of the barcode.
_Key = tuple[bool, str]


@dataclass(frozen=True, slots=True)
class Choice:
    """How to sort; None leaves it as it was called."""

    #: Mean qscore from which a call passes, Phred.
    min_qscore: float | None = None
    sheet: SampleSheet | None = None

    def as_json(self) -> dict[str, Any]:
        """Return it in a form that JSON can hold."""
        return {"min_qscore": self.min_qscore, "sheet": self.sheet.as_json() if self.sheet else None}


def read_choice(workspace: Workspace) -> Choice | None:
    """Return how the run was last sorted again; None: never."""
    stored = read_json(workspace.sorted / "choice.json")
    if stored is None:
        return None
    sheet = SampleSheet.from_json(stored["sheet"]) if stored["sheet"] is not None else None
    return Choice(stored["min_qscore"], sheet)


def choose(workspace: Workspace, choice: Choice) -> None:
    """Have the next merge sort all batches by a choice; what was sorted by another is removed."""
    shutil.rmtree(workspace.sorted, ignore_errors=True)
    workspace.sorted.mkdir(parents=True)
    write_json(workspace.sorted / "choice.json", choice.as_json())


def is_barcoded(workspace: Workspace) -> bool:
    """Tell whether any batch was barcoded when it was called: then a sample sheet has barcodes to name."""
    return any("barcoding" in read_manifest(workspace, name)["groups"] for name in committed_ids(workspace))


def sorted_batches(
    workspace: Workspace,
    plan: Plan,
    manifests: Sequence[dict[str, Any]],
    choice: Choice | None,
) -> list[SortedBatch]:
    """Return where each batch's files are, sorted by the choice; sorts what is not yet."""
    batches = []
    for batch, manifest in zip(plan.batches, manifests, strict=True):
        folder = workspace.committed / batch.batch_id
        if choice is not None:
            sorted_folder = workspace.sorted / batch.batch_id
            told = read_json(sorted_folder / MANIFEST)
            if told is None:
                told = _sort(folder, manifest, sorted_folder, choice, [run.info for run in plan.runs])
            folder, manifest = sorted_folder, {**manifest, **told}
        batches.append(SortedBatch(folder, manifest))
    if choice is not None:
        fsync_path(workspace.sorted)
    return batches


def _sort(
    source: Path,
    manifest: dict[str, Any],
    target: Path,
    choice: Choice,
    runs: Sequence[RunInfo],
) -> dict[str, Any]:
    """Sort a batch's files again into a folder of their own; return what its manifest tells of them."""
    new = target.with_name(f".{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    files: dict[str, Any] = {}
    for number in sorted({told["run"] for told in manifest["files"].values()}):
        before = pl.read_parquet(source / summary_part(number), glob=False)
        after = _decide(before, choice, runs[number])
        after.write_parquet(new / summary_part(number), compression="zstd")
        for kind in sorted({told["kind"] for told in manifest["files"].values()}):
            old = {
                (told["passes"], told["folder"]): source / name
                for name, told in manifest["files"].items()
                if told["run"] == number and told["kind"] == kind
            }
            if not old:
                continue
            sorter: _Sorter = _Fastq() if kind == "fastq" else _Bam(next(iter(old.values())))
            files |= _resort(sorter, new, number, old, before, after)
    told = {"files": files, "groups": manifest["groups"]}
    write_json(new / MANIFEST, told, durable=False)
    for file in new.iterdir():  # on disk before it has the name by which it is taken for whole
        fsync_path(file)
    fsync_path(new)
    new.rename(target)
    return told


def _decide(rows: pl.DataFrame, choice: Choice, run: RunInfo) -> pl.DataFrame:
    """Return a part of the summary as the choice would have made it."""
    if choice.min_qscore is not None:
        rows = rows.with_columns(passes_filtering=pl.col("mean_qscore_template") >= choice.min_qscore)
    if choice.sheet is None or "barcode_arrangement" not in rows.columns:
        return rows
    found = {name: choice.sheet.find(name, run) for name in rows["barcode_arrangement"].unique().drop_nulls()}
    alias = {name: word(alias) or name for name, (alias, _) in found.items()}
    arrangement = pl.col("barcode_arrangement")
    return rows.with_columns(
        alias=arrangement.replace_strict(alias, default=None, return_dtype=pl.String),
        type=arrangement.replace_strict(
            {name: kind or None for name, (_, kind) in found.items()}, default=None, return_dtype=pl.String
        ),
        folder=arrangement.replace_strict(
            {name: path_part(text) for name, text in alias.items()}, default="", return_dtype=pl.String
        ),
    )


def _barcodes(rows: pl.DataFrame) -> Iterator[Barcode | None]:
    """Yield the barcode of each row, as far as names go."""
    if "barcode_arrangement" not in rows.columns:
        yield from (None for _ in range(rows.height))
        return
    names = ("barcode_arrangement", "barcode_kit", "alias")
    for arrangement, kit, alias in zip(*(rows[name].to_list() for name in names), strict=True):
        named = alias if alias != arrangement else ""
        yield None if arrangement is None else Barcode(arrangement=arrangement, kit=kit or "", alias=named or "")


class _Sorter(Protocol):
    """What differs between the kinds of files."""

    kind: Staged

    def records(self, path: Path) -> Iterator[tuple[str, bytes]]:
        """Yield the id and the bytes of each call, with all its records."""

    def renamed(self, record: bytes, barcode: Barcode) -> bytes:
        """Return the records of a call with another name of its barcode."""

    def head(self, barcode: Barcode | None) -> bytes:
        """Return what a file begins with."""

    def group(self, barcode: Barcode) -> str:
        """Return the @RG line of a barcode; empty where there are none."""


class _Fastq:
    kind: Staged = "fastq"

    def records(self, path: Path) -> Iterator[tuple[str, bytes]]:
        with igzip.open(path, "rb") as file:  # type: ignore[no-untyped-call]
            for header in file:
                yield (
                    header[1:].split(None, 1)[0].decode(),
                    header + file.readline() + file.readline() + file.readline(),
                )

    def renamed(self, record: bytes, barcode: Barcode) -> bytes:
        header, rest = record.split(b"\n", 1)
        return renamed_header(header, barcode) + b"\n" + rest

    def head(self, barcode: Barcode | None) -> bytes:
        return b""

    def group(self, barcode: Barcode) -> str:
        return ""


class _Bam:
    kind: Staged = "bam"

    def __init__(self, any_file: Path) -> None:
        self._header = read_header(any_file)
        #: That of the run, which stands before those of barcodes.
        self._line = self._header.groups[0]
        self._id = group_id(self._line)

    def records(self, path: Path) -> Iterator[tuple[str, bytes]]:
        read_id, gathered = "", b""
        for record in iterate_bam(path):
            if record.primary and gathered:
                yield read_id, gathered
                gathered = b""
            read_id = record.read_id
            gathered += record.as_written
        if gathered:
            yield read_id, gathered

    def renamed(self, record: bytes, barcode: Barcode) -> bytes:
        label = barcode_label(barcode)
        group = f"{self._id}_{label}" if label else self._id
        return b"".join(one.with_barcode(group, label) for one in records_in(record))

    def head(self, barcode: Barcode | None) -> bytes:
        return self._header.content(dict.fromkeys((self._line, self.group(barcode) if barcode else self._line)))

    def group(self, barcode: Barcode) -> str:
        return barcode_group_line(self._line, barcode)


def _resort(
    sorter: _Sorter, folder: Path, run: int, old: Mapping[_Key, Path], before: pl.DataFrame, after: pl.DataFrame
) -> dict[str, Any]:
    """Read the old files of a run and kind along the rows of the summary, and write them sorted, in the same order.

    Returns:
        What the manifest tells of the new files.

    Raises:
        InputError: an old file does not hold the calls that the summary names.
    """
    streams = {key: sorter.records(path) for key, path in old.items()}
    files: dict[_Key, CallFile] = {}
    known: set[tuple[_Key, str]] = set()
    rows = zip(
        before["read_id"],
        zip(before["passes_filtering"], before["folder"], strict=True),
        zip(after["passes_filtering"], after["folder"], strict=True),
        _barcodes(before),
        _barcodes(after),
        strict=True,
    )
    for read_id, was, now, old_barcode, barcode in rows:
        found, record = next(streams[was], ("nothing", b""))
        if found != read_id:
            raise InputError(str(old[was]), "damaged", f"holds {found} where the summary has read {read_id}")
        file = files.get(now)
        if file is None:
            place = Place(run, sorter.kind, *now)
            file = files[now] = CallFile(folder / place.file, place, barcode, sorter.head(barcode))
        if barcode is not None:
            if barcode != old_barcode:
                record = sorter.renamed(record, barcode)
            if (seen := (now, barcode_label(barcode))) not in known:
                known.add(seen)
                if barcode != file.barcode and (line := sorter.group(barcode)):
                    file.late_groups[line] = None
        file.records.append(record)
        if len(file.records) == TOGETHER:
            file.compress()
    return {file.path.name: file.close() for file in files.values()}
