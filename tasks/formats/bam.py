"""BAM: calls as records, with dorado's tags in dorado's order, and files that join without recompression.

Formats: SAM specification, section 4.2 (BAM) and 1.3 (header); SAM optional fields specification; ONT output
specification, bam; tags and their types as dorado 1.4 writes them. A header stands in BGZF blocks of its own, so that
records can be taken from behind it as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np
from isal import igzip

from tasks.core.alignment import (
    OPERATIONS,
    REVERSED,
    SECONDARY,
    SUPPLEMENTARY,
    UNMAPPED,
    SamLine,
    parse_sam_line,
    reverse_complement,
)
from tasks.core.calls import Barcode, BasecalledRead, EngineIdentity
from tasks.core.errors import InputError, SettingsError
from tasks.core.reads import Read, RunInfo
from tasks.formats.bgzf import BgzfWriter, DeflateError, join, read_block
from tasks.formats.fastq import UNKNOWN, barcode_label, dorado_time, word

#: Codes of the bases, two to a byte (SAM specification, 4.2.4); U is written as T, for BAM has no code of its own.
_CODES = bytes.maketrans(b"=ACMGRSVTWYHKDBNU", bytes((*range(16), 8)))
#: From Phred + 33 to Phred.
_QUALITIES = bytes((byte - 33) & 0xFF for byte in range(256))
#: Size of the rest, reference, position, length of the name, mapping quality, bin, CIGAR operations, flag, length of
#: the sequence, next reference, next position, template length.
_FIXED = struct.Struct("<iiiBBHHHiiii")
#: qs du ns ts mx ch.
_FIRST = struct.Struct("<3sf3sf3si3si3si3si")
_SCALING = struct.Struct("<3sf3sf")
_INTEGER = struct.Struct("<3si")
_COUNT = struct.Struct("<4sI")
_POLY_A = struct.Struct("<3si4sI5i")
_BARCODE = struct.Struct("<4sI7f")
#: Bin of an unmapped record: that of position -1.
_NO_BIN = 4680
#: More CIGAR operations than this go into the tag CG.
_MOST_OPERATIONS = 0xFFFF
#: Tags of ours, to look up by two letters; of an aligner's line only the others are taken over.
_OURS = "qs du ns ts mx ch st rn fn sm sd sv dx RG pi sp mv pt pa po er me MN MM ML BC bv bi"
_SIZES = {"A": 1, "c": 1, "C": 1, "s": 2, "S": 2, "i": 4, "I": 4, "f": 4}
#: Letters of the struct module for those of SAM's arrays.
_ARRAY_LETTERS = {"c": "b", "C": "B", "s": "h", "S": "H", "i": "i", "I": "I", "f": "f"}
#: Who wrote the calls, by engine: the names of ONT's output specification where it has one.
_PROGRAMS = {"dorado": "dorado", "dorado-server": "ont_basecall_client"}


def read_group(run: RunInfo, identity: EngineIdentity, barcode: Barcode | None) -> str:
    """Return the id of the read group of a call."""
    label = barcode_label(barcode)
    known = f"{word(run.protocol_run_id) or UNKNOWN}_{word(identity.model) or UNKNOWN}"
    return f"{known}_{label}" if label else known


def read_group_line(run: RunInfo, identity: EngineIdentity, barcode: Barcode | None = None) -> str:
    """Return the @RG line of a run, or of a barcode in it."""
    mods = f" modbase_models={','.join(identity.modified_base_models)}" if identity.modified_base_models else ""
    device = run.tag("host_product_serial_number") or run.tag("hostname") or run.sequencer_position
    fields = [
        f"@RG\tID:{read_group(run, identity, None)}",
        f"PU:{word(run.flow_cell_id) or UNKNOWN}",
        f"PM:{word(device) or UNKNOWN}",
        f"DT:{_time(run.protocol_start_time)}",
        "PL:ONT",
        f"DS:runid={word(run.protocol_run_id) or UNKNOWN} basecall_model={word(identity.model) or UNKNOWN}{mods} "
        f"experiment_id={word(run.experiment_name) or UNKNOWN} "
        f"acquisition_start_time={_time(run.acquisition_start_time)} model_stride={identity.stride}",
        f"LB:{word(run.sample_id) or UNKNOWN}",
    ]
    line = "\t".join(fields)
    return line if barcode is None else barcode_group_line(line, barcode)


def barcode_group_line(line: str, barcode: Barcode) -> str:
    """Return the @RG line of a barcode, given that of its run; the same when it is unclassified."""
    label = barcode_label(barcode)
    if not label:
        return line
    known = group_id(line)
    arrangement = word(barcode.arrangement)
    more = f"bk:{word(barcode.kit) or UNKNOWN}\tSM:{arrangement}\tal:{word(barcode.alias) or arrangement}"
    return f"{line.replace(known, f'{known}_{label}', 1)}\t{more}"


def group_id(line: str) -> str:
    """Return the id in an @RG line."""
    return next(field[3:] for field in line.split("\t") if field.startswith("ID:"))


def header(identity: EngineIdentity, groups: Sequence[str], references: Mapping[str, int]) -> bytes:
    """Return a BAM file's header, not compressed.

    Args:
        groups: @RG lines.
        references: Lengths of the sequences that records are aligned to, bases.
    """
    program = f"@PG\tID:basecaller\tPN:{_PROGRAMS.get(identity.engine, 'shoal')}\tVN:{word(identity.version)}"
    gpu = f"\tDS:gpu:{identity.gpu}" if identity.gpu else ""
    lines = [
        "@HD\tVN:1.6\tSO:unknown",
        *(f"@SQ\tSN:{name}\tLN:{length}" for name, length in references.items()),
        program + gpu,
    ]
    table = [struct.pack("<i", len(references))]
    for name, length in references.items():
        table.append(struct.pack("<i", len(name) + 1) + name.encode() + b"\0" + struct.pack("<i", length))
    return Header(tuple(lines), b"".join(table), 0).content(groups)


class BamEncoder:
    """Encodes the calls of one run; what is the same in all of them is worked out once."""

    def __init__(self, run: RunInfo, identity: EngineIdentity, references: Mapping[str, int]) -> None:
        self._run = run
        self._identity = identity
        self._places = {name: number for number, name in enumerate(references)}
        self._rate = run.sample_rate
        start = run.acquisition_start_time
        self._epoch_ms = round(start.timestamp() * 1000) if start else None
        #: Tags of text that few values occur of.
        self._texts: dict[tuple[str, str], bytes] = {}
        self._groups: dict[str, bytes] = {}

    def records(self, read: Read, call: BasecalledRead) -> bytes:
        """Return the records of a call: one, or one for each of its alignments."""
        tags = b"".join(self._tags(read, call))
        if call.alignments is None:
            bulk = b"".join((tags, _moves(call), self._after_moves(read, call), _modified(call), _barcoding(call)))
            return _record(call.read_id, call.sequence, call.qstring.translate(_QUALITIES), bulk)
        return b"".join(self._aligned(parse_sam_line(line), read, call, tags) for line in call.alignments)

    def _aligned(self, line: SamLine, read: Read, call: BasecalledRead, tags: bytes) -> bytes:
        """Encode one alignment. Moves and modified bases go only with the whole sequence: they count along it."""
        sequence, quality = _as_aligned(line, call)
        whole = len(sequence) == len(call.sequence)
        bulk = (
            tags,
            _moves(call) if whole else b"",
            self._after_moves(read, call),
            _modified(call) if whole else b"",
            _barcoding(call),
            b"".join(tag_bytes(field) for field in line.tags if field[:2] not in _OURS),
        )
        if not line.mapped:
            return _record(call.read_id, sequence, quality, b"".join(bulk))
        try:
            place = self._places[line.reference]
        except KeyError as error:
            raise SettingsError(
                f"output.reference: read {call.read_id} is aligned to {line.reference!r}, which the reference given "
                f"({len(self._places)} sequences) has not; give the FASTA file that the engine aligns to"
            ) from error
        return _record(call.read_id, sequence, quality, b"".join(bulk), line, place)

    def _tags(self, read: Read, call: BasecalledRead) -> Iterator[bytes]:
        """Yield the tags before the moves."""
        if call.duplex == 1:
            yield struct.pack(
                "<3sf3si3si3si", b"qsf", call.mean_qscore, b"dxi", 1, b"mxi", read.mux, b"chi", read.channel
            )
            yield self._started(read, call)
            yield self._group(call)
            if call.split:
                yield _text("pi", call.parent_read_id)
            return
        duration = call.num_samples / self._rate
        yield _FIRST.pack(
            b"qsf",
            call.mean_qscore,
            b"duf",
            duration,
            b"nsi",
            call.num_samples,
            b"tsi",
            call.trimmed_samples,
            b"mxi",
            read.mux,
            b"chi",
            read.channel,
        )
        yield self._started(read, call)
        yield _INTEGER.pack(b"rni", -1 if call.split else read.read_number)
        yield self._remembered("fn", read.file)
        yield _SCALING.pack(b"smf", call.scaling_midpoint, b"sdf", call.scaling_dispersion)
        yield self._remembered("sv", call.scaling_version)
        yield _INTEGER.pack(b"dxi", call.duplex)
        yield self._group(call)
        if call.split:
            yield _text("pi", call.parent_read_id)
            yield _INTEGER.pack(b"spi", call.split_point)

    def _after_moves(self, read: Read, call: BasecalledRead) -> bytes:
        pore = self._remembered("po", word(read.pore_type) or "not_set")
        if call.duplex == 1:
            return pore
        tail = call.poly_tail
        poly_a = b""
        if tail is not None:
            places = (tail.anchor, tail.start, tail.end, tail.start_2, tail.end_2)
            poly_a = _POLY_A.pack(b"pti", tail.length, b"paBi", 5, *places)
        return b"".join(
            (
                poly_a,
                pore,
                self._remembered("er", call.end_reason(read)),
                struct.pack("<3sI", b"meI", read.minknow_events),
            )
        )

    def _started(self, read: Read, call: BasecalledRead) -> bytes:
        if self._epoch_ms is None:
            return b""
        sample = read.start_sample + call.split_point
        return _text("st", dorado_time(self._epoch_ms + sample * 1000 // self._rate))

    def _group(self, call: BasecalledRead) -> bytes:
        label = barcode_label(call.barcode)
        group = self._groups.get(label)
        if group is None:
            group = self._groups[label] = _text("RG", read_group(self._run, self._identity, call.barcode))
        return group

    def _remembered(self, tag: str, text: str) -> bytes:
        found = self._texts.get((tag, text))
        if found is None:
            found = self._texts[tag, text] = _text(tag, Path(text).name if tag == "fn" else text)
        return found


def _as_aligned(line: SamLine, call: BasecalledRead) -> tuple[bytes, bytes]:
    """Return sequence and qualities (Phred) of an alignment; of a primary one that leaves them out, the call's."""
    if line.sequence != "*" or not line.primary:
        sequence = b"" if line.sequence == "*" else line.sequence.encode()
        if line.qualities == "*":
            return sequence, b"\xff" * len(sequence)
        return sequence, line.qualities.encode().translate(_QUALITIES)
    quality = call.qstring.translate(_QUALITIES)
    if line.flag & REVERSED:
        return reverse_complement(call.sequence), quality[::-1]
    return call.sequence, quality


def _record(
    name: str, sequence: bytes, quality: bytes, tags: bytes, line: SamLine | None = None, place: int = -1
) -> bytes:
    """Encode a record; without a line of SAM it is unmapped."""
    flag, position, mapping_quality, bin_, operations = UNMAPPED, -1, 0, _NO_BIN, b""
    if line is not None:
        flag, position, mapping_quality = line.flag, line.position, line.mapping_quality
        span = line.count("MDN=X")
        bin_ = _bin(position, position + max(span, 1))
        operations = b"".join(
            struct.pack("<I", length << 4 | OPERATIONS.index(letter)) for length, letter in line.cigar
        )
        if len(line.cigar) > _MOST_OPERATIONS:
            tags += _COUNT.pack(b"CGBI", len(line.cigar)) + operations
            operations = struct.pack(
                "<II", len(sequence) << 4 | OPERATIONS.index("S"), span << 4 | OPERATIONS.index("N")
            )
    length = len(sequence)
    codes = np.frombuffer(sequence.translate(_CODES) + (b"\0" if length % 2 else b""), np.uint8)
    packed = (codes[::2] << 4 | codes[1::2]).tobytes()
    label = name.encode() + b"\0"
    size = 32 + len(label) + len(operations) + len(packed) + length + len(tags)
    fixed = _FIXED.pack(
        size,
        place,
        position,
        len(label),
        mapping_quality,
        bin_,
        len(operations) // 4,
        flag,
        length,
        -1,
        -1,
        0,
    )
    return b"".join((fixed, label, operations, packed, quality, tags))


def _moves(call: BasecalledRead) -> bytes:
    if call.moves is None or call.duplex == 1:
        return b""
    return _COUNT.pack(b"mvBc", len(call.moves) + 1) + bytes((call.stride,)) + call.moves.tobytes()


def _modified(call: BasecalledRead) -> bytes:
    modified = call.modified
    if modified is None:
        return b""
    likely = modified.probabilities
    return b"".join(
        (
            _INTEGER.pack(b"MNi", len(call.sequence)),
            _text("MM", modified.positions),
            _COUNT.pack(b"MLBC", len(likely)),
            likely.tobytes(),
        )
    )


def _barcoding(call: BasecalledRead) -> bytes:
    barcode = call.barcode
    label = barcode_label(barcode)
    if barcode is None or not label:
        return b""
    figures = (
        barcode.score,
        barcode.front_begin_index,
        barcode.front_foundseq_length,
        barcode.front_score,
        barcode.rear_end_index,
        barcode.rear_foundseq_length,
        barcode.rear_score,
    )
    return _text("BC", label) + _text("bv", barcode.variant or "n/a") + _BARCODE.pack(b"biBf", 7, *figures)


def tag_bytes(field: str) -> bytes:
    """Encode an optional field of SAM, `NM:i:5`.

    Raises:
        ValueError: it is none.
    """
    tag, _, typed = field.partition(":")
    kind, _, value = typed.partition(":")
    if kind in ("Z", "H"):
        return f"{tag}{kind}{value}\0".encode()
    if kind == "A":
        return f"{tag}A{value}".encode()
    if kind == "f":
        return tag.encode() + struct.pack("<sf", b"f", float(value))
    if kind == "i":
        number = int(value)
        letter = "I" if number > 0x7FFFFFFF else "i"
        return f"{tag}{letter}".encode() + struct.pack(f"<{letter}", number)
    if kind == "B":
        of, *values = value.split(",")
        numbers = [float(text) if of == "f" else int(text) for text in values]
        packed = struct.pack(f"<{len(numbers)}{_ARRAY_LETTERS[of]}", *numbers)
        return f"{tag}B{of}".encode() + struct.pack("<I", len(numbers)) + packed
    raise ValueError(f"not an optional field of SAM: {field[:80]!r}")


def _text(tag: str, text: str) -> bytes:
    return f"{tag}Z{text}\0".encode()


def _time(when: datetime | None) -> str:
    return dorado_time(round(when.timestamp() * 1000)) if when else UNKNOWN


def _bin(start: int, stop: int) -> int:
    """Return the bin of a stretch of reference (SAM specification, 5.3)."""
    for shift, first in ((14, 4681), (17, 585), (20, 73), (23, 9), (26, 1)):
        if start >> shift == (stop - 1) >> shift:
            return first + (start >> shift)
    return 0


def write_header(file: BgzfWriter, content: bytes) -> None:
    """Write a header in blocks of its own."""
    file.write(content)
    file.flush()


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a BAM file of ours, and where its records begin."""

    #: Lines of SAM.
    lines: tuple[str, ...]
    #: The table of reference sequences, as in the file.
    references: bytes
    #: Compressed bytes before the records.
    size: int

    def content(self, groups: Iterable[str]) -> bytes:
        """Return the header with other @RG lines, not compressed."""
        lines = [*(line for line in self.lines if not line.startswith("@RG")), *groups]
        text = "".join(f"{line}\n" for line in lines).encode()
        return b"".join((b"BAM\x01", struct.pack("<i", len(text)), text, self.references))

    @property
    def groups(self) -> tuple[str, ...]:
        """The @RG lines."""
        return tuple(line for line in self.lines if line.startswith("@RG"))


def read_header(path: Path) -> Header:
    """Read the header of a BAM file that `write_header` began.

    Raises:
        InputError: it is none, or its header does not end where a block does.
    """
    try:
        with path.open("rb") as file:
            content, wanted = b"", 12
            while len(content) < wanted:
                content += read_block(file)
                text = struct.unpack_from("<4xi", content)[0]
                wanted = _header_length(content, text)
            if content[:4] != b"BAM\x01" or len(content) != wanted:
                raise InputError(str(path), "not_bam", "has no BAM header in blocks of its own")
            lines = content[8 : 8 + text].decode().splitlines()
            return Header(tuple(lines), content[8 + text :], file.tell())
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise InputError(str(path), "not_bam", f"has no BAM header: {error}") from error


def _header_length(content: bytes, text: int) -> int:
    """Return the length of a header, as far as the beginning of it tells."""
    at = 8 + text
    if len(content) < at + 4:
        return at + 4
    count = struct.unpack_from("<i", content, at)[0]
    at += 4
    for _ in range(count):
        if len(content) < at + 4:
            return at + 4
        at += 8 + int(struct.unpack_from("<i", content, at)[0])
    return at


def join_bam(parts: Sequence[Path], target: BinaryIO, *, groups: Iterable[str] = ()) -> None:
    """Join BAM files of one run without recompression: the first one's header with the read groups of all.

    Args:
        groups: @RG lines to add.

    Raises:
        InputError: a part is no BAM file of ours, or does not end as one.
    """
    headers = [read_header(part) for part in parts]
    lines = dict.fromkeys(line for head in headers for line in head.groups) | dict.fromkeys(groups)
    write_header(BgzfWriter(target), headers[0].content(lines))
    join(parts, target, skip=[head.size for head in headers])


@dataclass(frozen=True, slots=True)
class BamRecord:
    """A record as it stands in the file."""

    read_id: str
    flag: int
    #: Without the size in front.
    content: bytes

    @property
    def primary(self) -> bool:
        return not self.flag & (SECONDARY | SUPPLEMENTARY)

    @property
    def bases(self) -> int:
        """Length of its sequence."""
        return int(struct.unpack_from("<i", self.content, 16)[0])

    def with_barcode(self, group: str, label: str) -> bytes:
        """Return the record, size in front, with another read group and barcode."""
        changed = {b"RG": _text("RG", group), b"BC": _text("BC", label)}
        at = _tags_start(self.content)
        parts = [self.content[:at]]
        while at < len(self.content):
            stop = _tag_stop(self.content, at)
            parts.append(changed.get(self.content[at : at + 2], self.content[at:stop]))
            at = stop
        content = b"".join(parts)
        return struct.pack("<i", len(content)) + content

    @property
    def as_written(self) -> bytes:
        """The record with its size in front."""
        return struct.pack("<i", len(self.content)) + self.content


def records_in(content: bytes) -> Iterator[BamRecord]:
    """Take records apart that stand one after another, each with its size in front."""
    at = 0
    while at < len(content):
        size = struct.unpack_from("<i", content, at)[0]
        yield _parsed(content[at + 4 : at + 4 + size])
        at += 4 + size


def _parsed(content: bytes) -> BamRecord:
    flag: int = struct.unpack_from("<H", content, 14)[0]
    return BamRecord(content[32 : 31 + content[8]].decode(), flag, content)


def iterate_bam(path: Path) -> Iterator[BamRecord]:
    """Yield the records of a BAM file; holds one.

    Raises:
        InputError: it is no BAM file, or ends in the middle.
    """
    try:
        with igzip.open(path, "rb") as file:  # type: ignore[no-untyped-call]

            def take(size: int) -> bytes:
                data: bytes = file.read(size)
                if len(data) < size:
                    raise InputError(str(path), "truncated", "ends in the middle of a record")
                return data

            def number() -> int:
                value: int = struct.unpack("<i", take(4))[0]
                return value

            if file.read(4) != b"BAM\x01":
                raise InputError(str(path), "not_bam", "does not begin as a BAM file does")
            take(number())
            for _ in range(number()):
                take(number() + 4)
            while size := file.read(4):
                yield _parsed(take(struct.unpack("<i", size)[0]))
    except (OSError, EOFError, struct.error, DeflateError) as error:
        raise InputError(str(path), "damaged", f"can't be read as BAM: {error}") from error


def _tags_start(content: bytes) -> int:
    operations, length = struct.unpack_from("<H", content, 12)[0], struct.unpack_from("<i", content, 16)[0]
    return int(32 + content[8] + 4 * operations + (length + 1) // 2 + length)


def _tag_stop(content: bytes, at: int) -> int:
    kind = chr(content[at + 2])
    if kind in "ZH":
        return content.index(b"\0", at + 3) + 1
    if kind == "B":
        count: int = struct.unpack_from("<I", content, at + 4)[0]
        return at + 8 + count * _SIZES[chr(content[at + 3])]
    return at + 3 + _SIZES[kind]
