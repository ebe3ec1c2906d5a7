"""The files that one batch makes: calls by run, verdict, barcode and kind, and the rows of the summary.

What a read becomes is decided here once, for split, which writes it first, and for sorting again, which moves it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from tasks.core.calls import Barcode, BasecalledRead, EngineIdentity
from tasks.core.errors import InputError
from tasks.core.reads import Read, RunInfo
from tasks.formats.bam import BamEncoder, header, join_bam, read_group_line, write_header
from tasks.formats.bgzf import BgzfWriter
from tasks.formats.fastq import FastqFormatter, barcode_label
from tasks.formats.layout import KINDS, path_part
from tasks.formats.reference import reference_sequences
from tasks.formats.samplesheet import SampleSheet, read_sample_sheet
from tasks.formats.summary import SummaryRows, groups_of
from tasks.settings import OutputSettings

Staged = Literal["fastq", "bam"]


@dataclass(frozen=True, slots=True)
class Place:
    """Which file of a batch a call goes into."""

    run: int
    kind: Staged
    passes: bool
    #: Folder of the barcode; empty without one.
    folder: str

    @property
    def file(self) -> str:
        verdict = "pass" if self.passes else "fail"
        return ".".join(filter(None, (f"run{self.run}", verdict, self.folder, KINDS[self.kind][1])))


class CallFile:
    """A file of calls of one batch. Open only while it is written to: a batch may have hundreds, one per barcode."""

    def __init__(self, path: Path, place: Place, barcode: Barcode | None, head: bytes = b"") -> None:
        self.path = path
        self.place = place
        self.barcode = barcode
        #: Formatted, not yet compressed.
        self.records: list[bytes] = []
        #: Calls written; a call of several alignments counts once.
        self.written = 0
        #: @RG lines beyond those of the header that the file began with.
        self.late_groups: dict[str, None] = {}
        self._digest = hashlib.sha256()
        path.touch(exist_ok=False)
        self._bgzf = BgzfWriter(self)
        if head:
            write_header(self._bgzf, head)

    def write(self, data: bytes) -> int:
        """Append compressed blocks: all of them, or raise OSError."""
        self._digest.update(data)
        # Buffered: a bare write to a disk that fills writes a part, and says so only in the count that it returns.
        with self.path.open("ab") as file:
            return file.write(data)

    def compress(self) -> int:
        """Write the records gathered so far; return their bytes."""
        text = b"".join(self.records)
        self.written += len(self.records)
        self.records.clear()
        self._bgzf.write(text)
        return len(text)

    def close(self) -> dict[str, Any]:
        """Finish the file; return what the manifest tells of it."""
        self.compress()
        self._bgzf.close()
        if self.late_groups:
            whole = self.path.with_name(f"{self.path.name}.new")
            with whole.open("wb") as file:
                join_bam([self.path], file, groups=self.late_groups)
            whole.replace(self.path)
            self._digest = hashlib.sha256(self.path.read_bytes())
        return {
            "run": self.place.run,
            "kind": self.place.kind,
            "passes": self.place.passes,
            "folder": self.place.folder,
            "barcode": self.barcode.arrangement if self.barcode else "",
            "alias": self.barcode.folder if self.barcode else "",
            "records": self.written,
            "bytes": self.path.stat().st_size,
            "sha256": self._digest.hexdigest(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How calls are written: what all batches of a bundle share."""

    identity: EngineIdentity
    output: OutputSettings
    min_qscore: float
    sheet: SampleSheet | None
    #: Lengths, bases, of what reads are aligned to.
    references: dict[str, int]

    @classmethod
    def of(cls, identity: EngineIdentity, output: OutputSettings, min_qscore: float) -> Writing:
        """Read the files that the settings name.

        Raises:
            SettingsError: sample sheet or reference can't be read.
        """
        return cls(
            identity=identity,
            output=output,
            min_qscore=min_qscore,
            sheet=read_sample_sheet(output.sample_sheet) if output.sample_sheet else None,
            references=reference_sequences(output.reference) if output.reference and "bam" in output.staged else {},
        )


class BatchOutputs:
    """Writes the calls of one batch, in the order in which they come, into its folder."""

    def __init__(self, folder: Path, writing: Writing) -> None:
        self._folder = folder
        self._writing = writing
        self._runs: dict[int, _RunOutputs] = {}
        self._files: dict[Place, CallFile] = {}

    @property
    def identity(self) -> EngineIdentity:
        """What called the reads."""
        return self._writing.identity

    def add(self, number: int, read: Read, calls: Iterable[BasecalledRead]) -> int:
        """Write the calls of a read, all of them or none; return their bases.

        Args:
            number: The plan's number of the read's run.

        Raises:
            InputError: the read has a value that a format can't hold.
        """
        run = self._runs.get(number) or _RunOutputs(read.run, self._writing)
        try:
            encoded = [run.encode(read, call) for call in calls]
        except (struct.error, ArithmeticError, ValueError) as error:
            message = f"read {read.read_id} in row {read.row} can't be written: {error}"
            raise InputError(read.file, "unwritable", message) from error
        self._runs[number] = run
        for call, passes, folder, records, row in encoded:
            for kind, record in records:
                file = self._file(number, kind, passes, folder, call.barcode, run)
                file.records.append(record)
                if kind == "bam":
                    run.see(file, call.barcode)
            run.rows.add(row)
        return sum(len(call.sequence) for call, *_ in encoded)

    def _file(
        self, number: int, kind: Staged, passes: bool, folder: str, barcode: Barcode | None, run: _RunOutputs
    ) -> CallFile:
        place = Place(number, kind, passes, folder)
        file = self._files.get(place)
        if file is None:
            head = run.header(barcode) if kind == "bam" else b""
            file = self._files[place] = CallFile(self._folder / place.file, place, barcode, head)
        return file

    def compress(self) -> int:
        """Write the records formatted since the last call; return their bytes."""
        return sum(file.compress() for file in self._files.values() if file.records)

    def close(self) -> dict[str, Any]:
        """Finish all files; return what the manifest tells of them."""
        files = {file.path.name: file.close() for file in self._files.values()}
        groups: dict[str, None] = {}
        for number, run in self._runs.items():
            table = run.rows.table()
            groups |= dict.fromkeys(groups_of(table.schema))
            pq.write_table(table, self._folder / summary_part(number), compression="zstd")
        return {"files": files, "groups": list(groups)}


def summary_part(run: int) -> str:
    """Return the name of the file with the summary's rows of a run, in a batch's folder."""
    return f"run{run}.summary.parquet"


class _RunOutputs:
    """What the outputs of one run in one batch share."""

    def __init__(self, run: RunInfo, writing: Writing) -> None:
        output, identity = writing.output, writing.identity
        self._run = run
        self._writing = writing
        self.fastq: FastqFormatter | None = None
        self.bam: BamEncoder | None = None
        if "fastq" in output.staged:
            self.fastq = FastqFormatter(run, identity, output.headers, rna_as_dna=output.rna_as_dna)
        if "bam" in output.staged:
            self.bam = BamEncoder(run, identity, writing.references)
        self.rows = SummaryRows()
        #: Alias and type of each arrangement.
        self._names: dict[str, tuple[str, str]] = {}
        #: Labels of the barcodes whose read groups are in each file's header.
        self._known: dict[Place, set[str]] = {}

    def encode(
        self, read: Read, called: BasecalledRead
    ) -> tuple[BasecalledRead, bool, str, list[tuple[Staged, bytes]], tuple[Any, ...]]:
        """Return a call as it is named here, its verdict and folder, its records, its row of the summary."""
        writing = self._writing
        call = called
        if call.barcode is not None and writing.sheet is not None:
            call = replace(call, barcode=self.named(call.barcode))
        passes = call.mean_qscore >= writing.min_qscore
        records: list[tuple[Staged, bytes]] = []
        if self.fastq:
            records.append(("fastq", self.fastq.record(read, call)))
        if self.bam:
            records.append(("bam", self.bam.records(read, call)))
        folder = path_part(call.barcode.folder) if call.barcode else ""
        return call, passes, folder, records, self.rows.row_of(read, call, passes)

    def named(self, barcode: Barcode) -> Barcode:
        """Return a barcode with the alias and type that the sample sheet gives it."""
        names = self._names.get(barcode.arrangement)
        if names is None:
            assert self._writing.sheet is not None
            names = self._names[barcode.arrangement] = self._writing.sheet.find(barcode.arrangement, self._run)
        return replace(barcode, alias=names[0], type=names[1])

    def header(self, barcode: Barcode | None) -> bytes:
        """Return a BAM header with the read group of the run, and of a barcode."""
        lines = dict.fromkeys(
            (read_group_line(self._run, self._writing.identity), self._group(barcode)),
        )
        return header(self._writing.identity, list(lines), self._writing.references)

    def see(self, file: CallFile, barcode: Barcode | None) -> None:
        """Note the read group of a record; those of two kits may meet in one folder."""
        known = self._known.setdefault(file.place, {"", barcode_label(file.barcode)})
        label = barcode_label(barcode)
        if label not in known:
            known.add(label)
            file.late_groups[self._group(barcode)] = None

    def _group(self, barcode: Barcode | None) -> str:
        return read_group_line(self._run, self._writing.identity, barcode)
