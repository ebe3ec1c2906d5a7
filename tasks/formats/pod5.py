"""POD5 in: an index of a file from its footer alone, and its reads as a stream.

A POD5 file is three Arrow tables (signal, run info, reads) one after another, with a flatbuffer footer that says where
each lies (POD5 specification, "Combined file layout"). The read table is a run of bytes near the end, so ids and
lengths cost one small read per file, and no signal is touched. Signal is decompressed by the pod5 library; the tables
are read with Arrow directly, for the library spends a millisecond on opening a file and microseconds on each attribute.
"""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from lib_pod5 import pod5_format_pybind

from tasks.core.errors import InputError, SettingsError
from tasks.core.reads import Read, RunInfo

SIGNATURE = b"\x8bPOD\r\n\x1a\n"
FOOTER_MAGIC = b"FOOTER\x00\x00"
#: Bytes after the footer's flatbuffer: its length (int64), the section marker (16), the signature (8).
TRAILER = 8 + 16 + 8
#: Bytes read from the end of a file at once: the tables of a small file, the footer of a large one.
TAIL = 64 * 1024
#: ContentType in the POD5 footer schema.
READS, SIGNAL, RUN_INFO = 0, 1, 4
#: Run info tables kept, some 10 kB each.
MOST_KNOWN_RUNS = 256
#: Columns of the read table that an index needs.
INDEXED = ["read_id", "num_samples", "run_info"]
#: Ten days at 5 kHz: longer reads are damaged numbers, which would swamp the sums of a plan.
MOST_SAMPLES = 1 << 32
READ_COLUMNS = frozenset(("read_id", "signal", "num_samples", "run_info", "channel", "well", "start", "read_number"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod5Index:
    """What launch needs to know of a file."""

    path: str
    #: Bytes.
    size: int
    #: The UUID bytes of each read, uint8, shape (reads, 16).
    read_ids: npt.NDArray[np.uint8]
    #: int64, shape (reads,).
    num_samples: npt.NDArray[np.int64]
    #: Index into `runs` of each read, int16, shape (reads,).
    run_of_read: npt.NDArray[np.int16]
    runs: tuple[RunInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """A read that can't be read; the reads around it can."""

    read_id: str
    position: int
    reason: str


def find_pod5(inputs: tuple[Path, ...], lists: tuple[Path, ...] = ()) -> list[Path]:
    """List the POD5 files under folders (recursively) and the files given, sorted, each once.

    Links to folders are followed; a dangling link is listed, so that it is reported and not passed over (also one with
    no suffix, which may have led to a folder), and so is a folder that can't be read. A file given by name is listed
    whatever its name; one named *.txt is a list of such paths, one per line.

    Args:
        lists: The lists that the inputs stand in.

    Raises:
        SettingsError: a list names itself, or is no text.
    """
    found: dict[Path, None] = {}
    for given in inputs:
        if given.suffix == ".txt" and given.is_file():
            text, here = given.read_text("utf-8", "surrogateescape"), given.resolve()
            if here in lists:
                raise SettingsError(f"input: the list {given} names itself, or is named by a list that it names")
            if "\0" in text:
                raise SettingsError(
                    f"input: {given} is no list of paths: it has a NUL byte; give a list of one per line"
                )
            paths = tuple(given.parent / line for line in text.splitlines() if line.strip())
            found.update(dict.fromkeys(find_pod5(paths, (*lists, here))))
            continue
        if not given.is_dir():
            found.setdefault(given.absolute())
            continue
        seen: set[tuple[int, int]] = set()
        for folder, subfolders, names in os.walk(
            given.absolute(), followlinks=True, onerror=lambda error: found.setdefault(Path(error.filename))
        ):
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:  # a link that leads back up
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders.sort()
            for name in sorted(names):
                if name.endswith(".pod5") or is_lost_folder(Path(folder, name)):
                    found.setdefault(Path(folder, name))
    return list(found)


def is_lost_folder(path: Path) -> bool:
    """Tell whether a path is a dangling link that may have led to a folder: its name has no suffix."""
    return "." not in path.name and path.is_symlink() and not os.access(path, os.F_OK)


def scan_pod5(path: Path) -> Pod5Index:
    """Index a file from its footer, run info and read table.

    Raises:
        InputError: the file is no POD5 file, has no footer (`unfinished`: truncated, or still being written), holds no
            reads, or can't be opened. The reason is the ledger's word for it.
    """
    with _opened(path) as (descriptor, size):
        tail_start = max(0, size - TAIL)
        tail = os.pread(descriptor, size - tail_start, tail_start)
        sections = _sections(path, descriptor, size, tail)

        def section(kind: int) -> bytes:
            offset, length = sections[kind]
            if offset >= tail_start:
                at = offset - tail_start
                return tail[at : at + length]
            return os.pread(descriptor, length, offset)

        runs = _run_infos(path, section(RUN_INFO))
        reads = _open_table(path, section(READS))
        schema = reads.schema
        if not READ_COLUMNS.issubset(schema.names) or not pa.types.is_dictionary(schema.field("run_info").type):
            raise InputError(str(path), "old_version", "written by an old version of POD5; `pod5 repack` renews it")
        ids, lengths, codes = [], [], []
        place = {acquisition_id: i for i, acquisition_id in enumerate(runs)}
        for b in range(reads.num_record_batches):
            batch = reads.get_batch(b).select(INDEXED)
            batch.validate(full=True)
            ids.append(_uuids(batch.column("read_id")))
            lengths.append(batch.column("num_samples").to_numpy().astype(np.int64))
            run = batch.column("run_info")
            try:
                here = np.array([place[name] for name in run.dictionary.to_pylist()], np.int16)
            except KeyError as error:
                raise InputError(str(path), "corrupt", f"a read names the unknown run {error}") from error
            codes.append(here[run.indices.to_numpy()])
    if not ids or not sum(map(len, ids)):
        raise InputError(str(path), "no_reads", "holds no reads")
    num_samples = np.concatenate(lengths)
    for length in num_samples[(num_samples < 0) | (num_samples > MOST_SAMPLES)][:1].tolist():
        raise InputError(str(path), "corrupt", f"has a read of {length} samples, which no run gives")
    return Pod5Index(
        path=str(path),
        size=size,
        read_ids=np.concatenate(ids),
        num_samples=num_samples,
        run_of_read=np.concatenate(codes),
        runs=tuple(runs.values()),
    )


def read_rows(path: str, start: int, stop: int, position: int = 0) -> Iterator[Read | Unreadable]:
    """Stream rows `start` to `stop` of a file's read table, in order; `position` counts on from the value given.

    Holds one read and one record batch's columns; pages of the mapped file are let go as the stream moves on.

    Raises:
        InputError: the file is not what it was when it was planned, or all that is left of these rows can't be read.
    """
    with _opened(Path(path)) as (descriptor, size), _mapped(path, descriptor, size) as mapped:
        tail_start = max(0, size - TAIL)
        sections = _sections(Path(path), descriptor, size, mapped[tail_start:])

        def section(kind: int) -> memoryview:
            offset, length = sections[kind]
            return memoryview(mapped)[offset : offset + length]

        runs = _run_infos(Path(path), section(RUN_INFO))
        signal = _SignalTable(_open_table(Path(path), section(SIGNAL)))
        reads = _open_table(Path(path), section(READS))
        base = held = 0
        for b in range(reads.num_record_batches):
            batch = reads.get_batch(b)
            lo, hi = max(start - base, 0), min(stop - base, batch.num_rows)
            if lo < hi:
                batch.validate(full=True)
                for read in _batch_reads(path, batch.slice(lo, hi - lo), base + lo, position, runs, signal):
                    position += 1
                    held += read.num_samples if isinstance(read, Read) else 0
                    if held > 8_000_000:  # else a 100 GB file would count, page by page, as our memory
                        mapped.madvise(mmap.MADV_DONTNEED)
                        held = 0
                    yield read
            base += batch.num_rows
            if base >= stop:
                return
        raise InputError(path, "changed", f"holds {base} reads, but the plan has rows up to {stop}; plan again")


class _SignalTable:
    """Rows of compressed signal, record batch by record batch."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self._rows_per_batch = table.get_batch(0).num_rows if table.num_record_batches else 1
        self._batches: dict[int, tuple[list[int], memoryview, list[int]]] = {}
        self._compressed = pa.types.is_large_binary(table.schema.field("signal").type)

    def read(self, rows: list[int], num_samples: int) -> npt.NDArray[np.int16]:
        """Return the signal of a read, int16, shape (num_samples,); raise when it doesn't decode to that."""
        parts = [(*self._batch(row // self._rows_per_batch), row % self._rows_per_batch) for row in rows]
        total = sum(samples[i] for _, _, samples, i in parts)
        if total != num_samples:  # before memory is taken for what may be a damaged number
            raise ValueError(f"signal has {total} samples, the read table says {num_samples}")
        out = np.empty(num_samples, np.int16)
        at = 0
        for offsets, packed, samples, i in parts:
            end = at + samples[i]
            if self._compressed:
                pod5_format_pybind.decompress_signal(packed[offsets[i] : offsets[i + 1]], out[at:end])
            else:
                out[at:end] = np.frombuffer(packed[2 * offsets[i] : 2 * offsets[i + 1]], np.int16)
            at = end
        return out

    def _batch(self, number: int) -> tuple[list[int], memoryview, list[int]]:
        """Return a batch's value offsets, bytes and sample counts; a few batches are kept, they hold no copies."""
        if number not in self._batches:
            batch = self._table.get_batch(number)
            batch.validate()  # else a damaged count of rows reads on beyond the columns, and the process with it
            column = batch.column("signal")
            buffers = column.buffers()
            offsets = np.frombuffer(buffers[1], np.int64)[: len(column) + 1].tolist()
            if len(self._batches) > 64:
                self._batches.pop(next(iter(self._batches)))
            samples = batch.column("samples").to_numpy().tolist()
            self._batches[number] = (offsets, memoryview(buffers[-1]), samples)
        return self._batches[number]


def _batch_reads(
    path: str, batch: Any, row: int, position: int, runs: dict[str, RunInfo], signal: _SignalTable
) -> Iterator[Read | Unreadable]:
    """Stream the reads of a slice of one record batch."""

    def numbers(name: str) -> list[Any]:
        return batch.column(name).to_numpy().tolist()  # type: ignore[no-any-return]

    def words(name: str) -> list[str]:
        column = batch.column(name)
        dictionary = column.dictionary.to_pylist()
        return [dictionary[i] for i in column.indices.to_numpy().tolist()]

    signal_column = batch.column("signal")
    offsets = np.asarray(signal_column.offsets).tolist()
    signal_rows = signal_column.values.to_numpy().tolist()
    columns = zip(
        _uuids(batch.column("read_id")),
        offsets,
        offsets[1:],
        numbers("num_samples"),
        words("run_info"),
        numbers("channel"),
        numbers("well"),
        numbers("read_number"),
        numbers("start"),
        numbers("num_minknow_events"),
        words("end_reason"),
        words("pore_type"),
        numbers("calibration_offset"),
        numbers("calibration_scale"),
        strict=False,
    )
    for identity, lo, hi, length, run, channel, well, number, start, events, end, pore, offset, scale in columns:
        text = identity.tobytes().hex()
        read_id = f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
        try:
            samples = signal.read(signal_rows[lo:hi], length)
        except MemoryError:  # the machine's fault, not the read's
            raise
        except Exception as error:  # Arrow, numpy and the library raise whatever the damaged bytes come to
            yield Unreadable(
                read_id=read_id,
                position=position,
                reason=f"unreadable_signal: {error} ({path} row {row})",
            )
        else:
            yield Read(
                read_id=read_id,
                signal=samples,
                calibration_offset=offset,
                calibration_scale=scale,
                run=runs[run],
                channel=channel,
                mux=well,
                read_number=number,
                start_sample=start,
                minknow_events=events,
                end_reason=end,
                pore_type=pore,
                file=path,
                row=row,
                position=position,
            )
        row += 1
        position += 1


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """Open a file for reading and give its descriptor and size; say in InputError why it can't be, or be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else a pipe waits for who writes into it
    except FileNotFoundError as error:
        if path.is_symlink():
            raise InputError(str(path), "dangling_link", f"links to {path.readlink()}, which is not there") from error
        raise InputError(str(path), "missing", "no such file") from error
    except OSError as error:
        raise InputError(str(path), "unreadable", f"can't be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise InputError(str(path), "unreadable", "is a folder that can't be listed")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(str(path), "not_pod5", "is not a regular file")
        yield descriptor, status.st_size
    except InputError:
        raise
    except Exception as error:  # Arrow and numpy raise whatever the damaged bytes come to; also OSError, of no number
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            cause = getattr(error, "strerror", "") or str(error) or "out of memory"
            raise InputError(str(path), "unreadable", f"can't be read: {cause}") from error
        cause = f"{type(error).__name__}: {error}"
        raise InputError(str(path), "corrupt", f"its tables are damaged ({cause}); `pod5 recover` may help") from error
    finally:
        os.close(descriptor)


@contextmanager
def _mapped(path: str, descriptor: int, size: int) -> Iterator[mmap.mmap]:
    if not size:
        raise InputError(path, "empty", "is empty")
    mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    # Not closed here: Arrow's views of it may outlive this frame; the map goes with the last of them.
    yield mapped


def _sections(path: Path, descriptor: int, size: int, tail: bytes) -> dict[int, tuple[int, int]]:
    """Find the tables of a file: {content type: (offset, length)}, from the last bytes of the file."""
    if size == 0:
        raise InputError(str(path), "empty", "is empty")
    if os.pread(descriptor, len(SIGNATURE), 0) != SIGNATURE:
        raise InputError(str(path), "not_pod5", "is not a POD5 file")
    if size < TRAILER + len(SIGNATURE) or tail[-len(SIGNATURE) :] != SIGNATURE:
        raise InputError(str(path), "unfinished", "has no footer: it is truncated, or still being written")
    (length,) = struct.unpack_from("<q", tail, len(tail) - TRAILER)
    start = len(tail) - TRAILER - length
    if length <= 0 or start < len(FOOTER_MAGIC) or tail[start - len(FOOTER_MAGIC) : start] != FOOTER_MAGIC:
        raise InputError(str(path), "corrupt", "its footer is damaged; `pod5 recover` may help")
    try:
        sections = _footer_contents(tail[start : start + length])
    except (struct.error, IndexError) as error:
        raise InputError(str(path), "corrupt", "its footer is damaged; `pod5 recover` may help") from error
    for kind in (READS, SIGNAL, RUN_INFO):
        offset, bytes_ = sections.get(kind, (-1, 0))
        if offset < 0 or bytes_ < 0 or offset + bytes_ > size:
            raise InputError(str(path), "corrupt", "its footer names tables outside the file; `pod5 recover` may help")
    return sections


def _footer_contents(footer: bytes) -> dict[int, tuple[int, int]]:
    """Read `contents` of the footer's flatbuffer: a vector of tables (offset, length, format, content type).

    Layout: POD5 specification, footer.fbs; flatbuffers are little-endian, a table begins with the distance back to its
    vtable, whose entries (from byte 4) are the fields' offsets in the table, 0 for a field at its default.
    """

    def field(table: int, index: int) -> int:
        vtable = table - struct.unpack_from("<i", footer, table)[0]
        (size,) = struct.unpack_from("<H", footer, vtable)
        if 4 + 2 * index >= size:
            return 0
        (offset,) = struct.unpack_from("<H", footer, vtable + 4 + 2 * index)
        return table + offset if offset else 0

    def value(table: int, index: int, kind: str) -> int:
        at = field(table, index)
        return int(struct.unpack_from(kind, footer, at)[0]) if at else 0

    (root,) = struct.unpack_from("<I", footer, 0)
    at = field(root, 3)
    if not at:
        return {}
    vector = at + struct.unpack_from("<I", footer, at)[0]
    (count,) = struct.unpack_from("<I", footer, vector)
    sections = {}
    for i in range(count):
        entry = vector + 4 + 4 * i
        table = entry + struct.unpack_from("<I", footer, entry)[0]
        sections[value(table, 3, "<h")] = (value(table, 0, "<q"), value(table, 1, "<q"))
    return sections


def _open_table(path: Path, section: bytes | memoryview) -> Any:
    try:
        return pa.ipc.open_file(pa.py_buffer(section))
    except pa.ArrowInvalid as error:
        raise InputError(str(path), "corrupt", f"a table is damaged ({error}); `pod5 recover` may help") from error


def _uuids(column: Any) -> npt.NDArray[np.uint8]:
    """Return the ids of a fixed_size_binary(16) column, uint8, shape (rows, 16)."""
    storage = getattr(column, "storage", column)
    flat = np.frombuffer(storage.buffers()[1], np.uint8)
    return flat[16 * storage.offset : 16 * (storage.offset + len(storage))].reshape(-1, 16)


#: Run infos by the bytes that told them: thousands of files of a run tell the same, and Arrow's maps are slow to read.
_KNOWN_RUNS: dict[bytes, dict[str, RunInfo]] = {}


def _run_infos(path: Path, section: bytes | memoryview) -> dict[str, RunInfo]:
    """Return the file's runs by acquisition id."""
    table = _open_table(path, section)
    own = (table.schema.metadata or {}).get(b"MINKNOW:file_identifier", b"")
    told = bytes(section).replace(own, b"") if own else bytes(section)
    runs = _KNOWN_RUNS.get(told)
    if runs is None:
        whole = table.read_all()
        whole.validate(full=True)  # what Arrow takes on trust ends the process: offsets, counts, text
        rows = whole.to_pylist()
        runs = {row["acquisition_id"]: _run_info(row) for row in rows}
        if len(_KNOWN_RUNS) >= MOST_KNOWN_RUNS:
            _KNOWN_RUNS.clear()
        _KNOWN_RUNS[told] = runs
    return runs


def _run_info(row: dict[str, Any]) -> RunInfo:
    return RunInfo(
        acquisition_id=row["acquisition_id"],
        acquisition_start_time=_time(row["acquisition_start_time"]),
        protocol_run_id=row["protocol_run_id"] or "",
        protocol_start_time=_time(row["protocol_start_time"]),
        flow_cell_id=row["flow_cell_id"] or "",
        flow_cell_product_code=row["flow_cell_product_code"] or "",
        sequencing_kit=row["sequencing_kit"] or "",
        sample_rate=row["sample_rate"],
        experiment_name=row["experiment_name"] or "",
        sample_id=row["sample_id"] or "",
        sequencer_position=row["sequencer_position"] or "",
        sequencer_position_type=row["sequencer_position_type"] or "",
        system_type=row["system_type"] or "",
        software=row["software"] or "",
        context_tags=tuple(sorted(row["context_tags"] or ())),
        tracking_id=tuple(sorted(row["tracking_id"] or ())),
    )


def _time(value: datetime | None) -> datetime | None:
    """Return a POD5 time stamp as UTC; converters write the epoch where they know none."""
    if value is None or value.timestamp() <= 0:
        return None
    return value.astimezone(timezone.utc)


def format_read_id(identity: bytes) -> str:
    """Return a read id as text: lower-case UUID with dashes."""
    return str(UUID(bytes=identity))
