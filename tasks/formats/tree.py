"""MinKNOW's tree of folders and files, for each run: links to the batches' files, or joins of them, and tables."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from tasks.core.errors import SettingsError
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
from tasks.formats.workspace import Workspace, fsync_path, read_json, write_text
from tasks.settings import OutputSettings

#: How names of calls end and those of tables begin, ours and MinKNOW's.
CALLS = (".fastq.gz", ".fastq", ".bam", ".sam", ".cram")
TABLES = ("sequencing_summary", "barcoding_summary", "final_summary", "output_hash")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """A file of calls that is to be made of batches' files: of one verdict and barcode."""

    staged: Staged
    passes: bool
    folder: str
    kind: Kind
    pieces: Sequence[_Piece]
    #: In the run's folder.
    name: PurePosixPath


@dataclass(frozen=True, slots=True, kw_only=True)
class _RunTree:
    """All that is to be made of a run."""

    number: int
    run: RunInfo
    #: Relative to the output folder.
    folder: str
    batches: Sequence[SortedBatch]
    #: Optional groups of columns that any of the batches has.
    groups: Sequence[str]
    files: Sequence[_File]
    #: Names of the tables; of the barcoding summary empty where there is none.
    summary: str
    barcoding: str
    final: str
    hashes: str

    @property
    def names(self) -> Iterator[str]:
        """The names of all files, relative to the output folder."""
        yield from (str(PurePosixPath(self.folder, file.name)) for file in self.files)
        tables = (self.summary, self.barcoding, self.final, self.hashes)
        yield from (str(PurePosixPath(self.folder, name)) for name in tables if name)


class Tree:
    """Lays out the tree, and writes it."""

    def __init__(
        self, out: Path, plan: Plan, batches: Sequence[SortedBatch], output: OutputSettings, *, marker: str
    ) -> None:
        self._out = out
        self._output = output
        #: Set into names when the bases are not real.
        self._marker = marker
        #: Folders of the runs, relative to the output folder.
        self.folders: list[str] = []
        #: Calls that pass and that don't.
        self.records = {True: 0, False: 0}
        self._runs = list(self._lay_out_all(plan, batches))
        #: Names of all files, relative to the output folder: known before any is made.
        self.names = [name for run in self._runs for name in run.names]

    def write(self) -> None:
        """Write every run that has anything called; all is on disk then but the names in the output folder itself."""
        for run in self._runs:
            self._write_run(run)
        for folder in sorted({folder for name in self.names for folder in PurePosixPath(name).parents[:-1]}):
            fsync_path(self._out / folder)

    def _lay_out_all(self, plan: Plan, batches: Sequence[SortedBatch]) -> Iterator[_RunTree]:
        for number, run in enumerate(plan.runs):
            of_run = [
                batch for batch in batches if any(part["run"] == number for part in batch.manifest["files"].values())
            ]
            if of_run:
                yield self._lay_out(number, run.info, of_run)

    def _lay_out(self, number: int, run: RunInfo, batches: Sequence[SortedBatch]) -> _RunTree:
        pieces: dict[tuple[Staged, bool, str], list[_Piece]] = {}
        for ordinal, batch in enumerate(batches):
            for name, told in batch.manifest["files"].items():
                if told["run"] == number and told["kind"] in self._output.staged:
                    key = (told["kind"], told["passes"], told["folder"])
                    pieces.setdefault(key, []).append(_Piece(batch.folder / name, ordinal, told))
        files = []
        for (staged, passes, folder), parts in pieces.items():
            if staged == self._output.staged[0]:
                self.records[passes] += sum(part.told["records"] for part in parts)
            kinds: list[Kind] = [kind for kind in dict.fromkeys(self._output.formats) if _staged(kind) == staged]
            for group in [parts] if self._output.files == "one" else [[part] for part in parts]:
                at = 0 if self._output.files == "one" else group[0].ordinal
                for kind in kinds:
                    name = layout.reads_name(run, kind, passes=passes, batch=at, barcode=folder, marker=self._marker)
                    files.append(_File(staged=staged, passes=passes, folder=folder, kind=kind, pieces=group, name=name))
        groups = list(dict.fromkeys(group for batch in batches for group in batch.manifest["groups"]))
        barcoded = self._output.barcoding_summary and "barcoding" in groups
        return _RunTree(
            number=number,
            run=run,
            folder=self._own_folder(str(layout.run_folder(run))),
            batches=batches,
            groups=groups,
            files=files,
            summary=layout.summary_name(run, marker=self._marker),
            barcoding=layout.barcoding_summary_name(run, marker=self._marker) if barcoded else "",
            final=layout.final_summary_name(run),
            hashes=layout.output_hash_name(run),
        )

    def _write_run(self, run: _RunTree) -> None:
        home = self._out / run.folder
        home.mkdir(parents=True, exist_ok=True)
        names: list[dict[tuple[str, bool, str], str]] = [{} for _ in run.batches]
        hashed: list[HashedFile] = []
        for file in run.files:
            digest = self._place(file.kind, file.pieces, home / file.name)
            told = file.pieces[0].told
            hashed.append(HashedFile(path=str(file.name), sha256=digest, barcode=told["barcode"], alias=told["alias"]))
            for part in file.pieces:  # a SAM or CRAM file stands in the column of BAM when there is no BAM
                names[part.ordinal].setdefault((file.staged, file.passes, file.folder), file.name.name)
        self._write_tables(run, home, names, hashed)

    def _write_tables(
        self,
        run: _RunTree,
        home: Path,
        names: Sequence[dict[tuple[str, bool, str], str]],
        hashed: Sequence[HashedFile],
    ) -> None:
        parts = [
            Part(batch.folder / summary_part(run.number), named)
            for batch, named in zip(run.batches, names, strict=True)
        ]
        write_summary(parts, self._output.summary, home / run.summary, groups=run.groups, kinds=self._output.staged)
        if run.barcoding:
            write_barcoding_summary(parts, run.groups, home / run.barcoding)
        fastqs = sum(file.path.startswith("fastq_") for file in hashed)
        ended = max(batch.manifest["ended"] for batch in run.batches)
        write_text(
            home / run.final,
            layout.final_summary(run.run, summary=run.summary, fastq_files=fastqs, processing_stopped=ended),
        )
        write_text(home / run.hashes, layout.output_hash(run.run, hashed))

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
        fsync_path(new)
        new.replace(target)


def names_written(workspace: Workspace) -> set[str]:
    """Return the names of the files in the tree that merges made or were about to make, relative to the output folder.

    All else in the tree is somebody else's.
    """
    names = read_json(workspace.written)
    if names is None:  # an older version told them in another file
        names = (read_json(workspace.merged) or {}).get("written", ())
    return set(names)


def refuse_foreign(workspace: Workspace, plan: Plan) -> None:
    """Raise SettingsError when calls that we did not write lie where ours would: they are not mixed, nor removed.

    So it is where the output folder is the one that MinKNOW writes, and basecalls, into: its tree is ours.
    """
    found = list(_foreign_files(workspace.out, plan, names_written(workspace)))
    if found:
        raise SettingsError(
            f"{workspace.out} holds {len(found)} files of calls, or tables of them, that are not this run's, where its "
            f"own would lie, e.g. {found[0]}; they are left as they are: give another output folder, or move them away"
        )


def _foreign_files(out: Path, plan: Plan, ours: Collection[str]) -> Iterator[Path]:
    """Find calls and their tables in the folders that a plan's runs may have."""
    wanted = Counter(out / layout.run_folder(run.info) for run in plan.runs if not run.refused)
    for first, runs in wanted.items():
        for home in (first, *(first.with_name(f"{first.name}-{n}") for n in range(2, runs + 1))):
            trees = {f"{tree}_{verdict}" for tree, _ in layout.KINDS.values() for verdict in ("pass", "fail")}
            calls = (path for tree in sorted(trees) for path in sorted((home / tree).rglob("*")))
            tables = (path for path in sorted(home.glob("*")) if path.name.startswith(TABLES))
            for path in (*(path for path in calls if path.name.endswith(CALLS)), *tables):
                # What a crash left half made has a leading dot.
                if not path.name.startswith(".") and str(path.relative_to(out)) not in ours:
                    yield path


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
