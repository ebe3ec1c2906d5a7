"""MinKNOW's tree of folders and files, for each run: links to the batches' files, or joins of them, and tables."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tasks.core.plan import Plan
from tasks.core.reads import RunInfo
from tasks.formats import layout
from tasks.formats.bam import join_bam
from tasks.formats.barcoding import write_barcoding_summary
from tasks.formats.bgzf import join
from tasks.formats.hts import convert_bam
from tasks.formats.layout import HashedFile, Kind
from tasks.formats.outputs import Staged, summary_part
from tasks.formats.summary import Part, write_summary
from tasks.formats.workspace import write_text
from tasks.settings import OutputSettings


@dataclass(frozen=True, slots=True)
class SortedBatch:
    """A batch's files, as they are sorted now."""

    folder: Path
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A batch's file, and the number of its batch in the run."""

    path: Path
    ordinal: int
    told: dict[str, Any]


class Tree:
    """Writes the tree."""

    def __init__(
        self, out: Path, plan: Plan, batches: Sequence[SortedBatch], output: OutputSettings, *, marker: str
    ) -> None:
        self._out = out
        self._plan = plan
        self._batches = batches
        self._output = output
        #: Set into names when the bases are not real.
        self._marker = marker
        #: Folders of the runs, relative to the output folder.
        self.folders: list[str] = []
        #: Files made, relative to the output folder.
        self.written: list[str] = []
        #: Calls that pass and that don't.
        self.records = {True: 0, False: 0}

    def write(self) -> None:
        """Write every run that has anything called."""
        for number, run in enumerate(self._plan.runs):
            batches = [
                batch
                for batch in self._batches
                if any(part["run"] == number for part in batch.manifest["files"].values())
            ]
            if batches:
                self._write_run(number, run.info, batches)

    def _write_run(self, number: int, run: RunInfo, batches: Sequence[SortedBatch]) -> None:
        home = self._out / self._own_folder(str(layout.run_folder(run)))
        home.mkdir(parents=True, exist_ok=True)
        pieces: dict[tuple[Staged, bool, str], list[_Piece]] = {}
        for ordinal, batch in enumerate(batches):
            for name, told in batch.manifest["files"].items():
                if told["run"] == number and told["kind"] in self._output.staged:
                    key = (told["kind"], told["passes"], told["folder"])
                    pieces.setdefault(key, []).append(_Piece(batch.folder / name, ordinal, told))
        names: list[dict[tuple[str, bool, str], str]] = [{} for _ in batches]
        hashed: list[HashedFile] = []
        for (staged, passes, folder), parts in pieces.items():
            if staged == self._output.staged[0]:
                self.records[passes] += sum(part.told["records"] for part in parts)
            kinds: list[Kind] = [kind for kind in dict.fromkeys(self._output.formats) if _staged(kind) == staged]
            for group in [parts] if self._output.files == "one" else [[part] for part in parts]:
                at = 0 if self._output.files == "one" else group[0].ordinal
                for kind in kinds:
                    name = layout.reads_name(run, kind, passes=passes, batch=at, barcode=folder, marker=self._marker)
                    digest = self._place(kind, group, home / name)
                    told = group[0].told
                    hashed.append(
                        HashedFile(path=str(name), sha256=digest, barcode=told["barcode"], alias=told["alias"])
                    )
                    for part in group:  # a SAM or CRAM file stands in the column of BAM when there is no BAM
                        names[part.ordinal].setdefault((staged, passes, folder), name.name)
        self._write_tables(number, run, home, batches, names, hashed)

    def _write_tables(
        self,
        number: int,
        run: RunInfo,
        home: Path,
        batches: Sequence[SortedBatch],
        names: Sequence[dict[tuple[str, bool, str], str]],
        hashed: Sequence[HashedFile],
    ) -> None:
        parts = [Part(batch.folder / summary_part(number), named) for batch, named in zip(batches, names, strict=True)]
        groups = list(dict.fromkeys(group for batch in batches for group in batch.manifest["groups"]))
        summary = home / layout.summary_name(run, marker=self._marker)
        write_summary(parts, self._output.summary, summary, groups=groups, kinds=self._output.staged)
        self._made(summary)
        if self._output.barcoding_summary and "barcoding" in groups:
            barcoding = home / layout.barcoding_summary_name(run, marker=self._marker)
            write_barcoding_summary(parts, groups, barcoding)
            self._made(barcoding)
        final = home / layout.final_summary_name(run)
        fastqs = sum(file.path.startswith("fastq_") for file in hashed)
        ended = max(batch.manifest["ended"] for batch in batches)
        write_text(final, layout.final_summary(run, summary=summary.name, fastq_files=fastqs, processing_stopped=ended))
        table = home / layout.output_hash_name(run)
        write_text(table, layout.output_hash(run, hashed))
        self._made(final)
        self._made(table)

    def _own_folder(self, wanted: str) -> str:
        """Give each run a folder of its own, also where missing metadata makes two the same."""
        folder, n = wanted, 1
        while folder in self.folders:
            n += 1
            folder = f"{wanted}-{n}"
        self.folders.append(folder)
        return folder

    def _place(self, kind: Kind, parts: Sequence[_Piece], target: Path) -> str:
        """Make a file of the tree of one batch's file or of several; return its sha256, hex."""
        target.parent.mkdir(parents=True, exist_ok=True)
        paths = [part.path for part in parts]
        if kind in ("sam", "cram"):
            self._convert(kind, paths, target)
        elif len(parts) > 1:
            replace_file(target, lambda file: join_bam(paths, file) if kind == "bam" else join(paths, file))
        else:
            _link(paths[0], target)
        self._made(target)
        linked = len(parts) == 1 and kind in ("fastq", "bam")
        return str(parts[0].told["sha256"]) if linked else sha256(target)

    def _convert(self, kind: Kind, parts: Sequence[Path], target: Path) -> None:
        """Make a SAM or CRAM file of BAM files."""
        joined = target.with_name(f".{target.name}.bam")
        if len(parts) > 1:
            replace_file(joined, lambda file: join_bam(parts, file))
        new = target.with_name(f".{target.name}.new")
        convert_bam(parts[0] if len(parts) == 1 else joined, new, kind, self._output.reference)
        joined.unlink(missing_ok=True)
        new.replace(target)

    def _made(self, path: Path) -> None:
        self.written.append(str(path.relative_to(self._out)))


def earlier_files(out: Path, plan: Plan) -> Iterator[Path]:
    """Find what earlier merges, whole or cut off, put into the tree: links to or joins of our batches, and tables."""
    for run in plan.runs:
        wanted = out / layout.run_folder(run.info)
        for home in wanted.parent.glob(f"{wanted.name}*"):
            yield from calls_files(home)
            yield from home.glob("sequencing_summary*.txt")
            yield from home.glob("barcoding_summary*.txt")


def calls_files(folder: Path, kinds: Sequence[Kind] = tuple(layout.KINDS)) -> Iterator[Path]:
    """Find the files of calls in a run's folder, or in all runs below a folder; sorted within a kind and verdict."""
    for kind in kinds:
        tree, suffix = layout.KINDS[kind]
        for verdict in ("pass", "fail"):
            yield from sorted(folder.rglob(f"{tree}_{verdict}/**/*.{suffix}"))


def replace_file(target: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write a file whole, and put it in place of what is there."""
    new = target.with_name(f".{target.name}.new")
    with new.open("wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(target)


def sha256(path: Path) -> str:
    """Return the sha256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _staged(kind: Kind) -> Staged:
    return "fastq" if kind == "fastq" else "bam"


def _link(source: Path, target: Path) -> None:
    """Make a file appear in the tree at no cost; where links are refused, copy it."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        replace_file(target, lambda file: _copy(source, file))


def _copy(source: Path, file: BinaryIO) -> None:
    with source.open("rb") as opened:
        shutil.copyfileobj(opened, file, 1 << 20)
