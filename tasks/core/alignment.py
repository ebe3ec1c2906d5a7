"""Alignments: a line of SAM taken apart, and the alignment columns of the sequencing summary.

Formats: SAM specification, sections 1.4 to 1.6; the columns count as dorado 1.4's summary does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

UNMAPPED, REVERSED, SECONDARY, SUPPLEMENTARY = 0x4, 0x10, 0x100, 0x800
#: The operations of a CIGAR, in the order of their codes in BAM.
OPERATIONS = "MIDNSHP=X"
_CIGAR = re.compile(rf"(\d+)([{OPERATIONS}])")
_CIGAR_WHOLE = re.compile(rf"\*|(?:\d+[{OPERATIONS}])+")
#: Mandatory fields of a line of SAM.
_FIELDS = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class SamLine:
    """One line of SAM."""

    flag: int
    #: Name of the reference sequence; `*` when unmapped.
    reference: str
    #: From 0; -1 when unmapped.
    position: int
    mapping_quality: int
    #: Lengths and operations (letters of OPERATIONS).
    cigar: tuple[tuple[int, str], ...]
    #: As aligned, so reverse-complemented on the reverse strand; `*`: left out.
    sequence: str
    #: Phred + 33, in the order of `sequence`; `*`: left out.
    qualities: str
    #: Optional fields, `NM:i:5`.
    tags: tuple[str, ...]

    @property
    def mapped(self) -> bool:
        return not self.flag & UNMAPPED

    @property
    def primary(self) -> bool:
        return not self.flag & (SECONDARY | SUPPLEMENTARY)

    def value(self, tag: str) -> str | None:
        """Return the text of an optional field; None where it is absent."""
        prefix = f"{tag}:"
        return next((field.split(":", 2)[2] for field in self.tags if field.startswith(prefix)), None)

    def count(self, operations: str) -> int:
        """Return the bases in the given CIGAR operations."""
        return sum(length for length, operation in self.cigar if operation in operations)


def parse_sam_line(line: str) -> SamLine:
    """Take a line of SAM apart.

    Raises:
        ValueError: it is not one; names what is wrong.
    """
    fields = line.rstrip("\n").split("\t")
    if len(fields) < _FIELDS:
        raise ValueError(f"a line of SAM has {_FIELDS} fields or more, not {len(fields)}: {line[:80]!r}")
    _, flag, reference, position, quality, cigar, _, _, _, sequence, qualities, *tags = fields
    if not _CIGAR_WHOLE.fullmatch(cigar):
        raise ValueError(f"not a CIGAR: {cigar[:80]!r}")
    return SamLine(
        flag=int(flag),
        reference=reference,
        position=int(position) - 1,
        mapping_quality=int(quality),
        cigar=tuple((int(length), operation) for length, operation in _CIGAR.findall(cigar)),
        sequence=sequence,
        qualities=qualities,
        tags=tuple(tags),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentFigures:
    """The alignment columns of the sequencing summary, in their order, for a read that is aligned."""

    genome: str
    #: `+` or `-`.
    direction: str
    #: From 0; the end is the first base after the alignment.
    genome_start: int
    genome_end: int
    #: Likewise, in the sequence as aligned.
    strand_start: int
    strand_end: int
    num_insertions: int
    num_deletions: int
    #: Bases of the read that stand against a base of the reference, and those of them that are the same.
    num_aligned: int
    num_correct: int
    #: Of the aligned bases.
    identity: float
    #: Of aligned bases, insertions and deletions.
    accuracy: float
    score: int
    #: Share of the sequence between `strand_start` and `strand_end`.
    coverage: float
    bed_hits: int
    mapping_quality: int
    #: Of the read: all, secondary, supplementary.
    num_alignments: int
    num_secondary_alignments: int
    num_supplementary_alignments: int


def alignment_figures(lines: Sequence[str]) -> AlignmentFigures | None:
    """Work out the columns of a read from its lines of SAM, the primary one first; None when it is not aligned.

    Raises:
        ValueError: a line is not SAM.
    """
    parsed = [parse_sam_line(line) for line in lines]
    mapped = [line for line in parsed if line.mapped]
    first = next((line for line in mapped if line.primary), None)
    if first is None or not first.cigar:
        return None
    insertions, deletions, aligned = first.count("I"), first.count("D"), first.count("M=X")
    correct = aligned - _substitutions(first, insertions + deletions)
    clipped_start = first.cigar[0][0] if first.cigar[0][1] == "S" else 0
    clipped_end = first.cigar[-1][0] if len(first.cigar) > 1 and first.cigar[-1][1] == "S" else 0
    length = first.count("MIS=X")
    return AlignmentFigures(
        genome=first.reference,
        direction="-" if first.flag & REVERSED else "+",
        genome_start=first.position,
        genome_end=first.position + first.count("MDN=X"),
        strand_start=clipped_start,
        strand_end=length - clipped_end,
        num_insertions=insertions,
        num_deletions=deletions,
        num_aligned=aligned,
        num_correct=correct,
        identity=correct / aligned if aligned else 0.0,
        accuracy=correct / (aligned + insertions + deletions) if aligned else 0.0,
        score=int(first.value("AS") or 0),
        coverage=(length - clipped_end - clipped_start) / length if length else 0.0,
        bed_hits=int(first.value("bh") or 0),
        mapping_quality=first.mapping_quality,
        num_alignments=len(mapped),
        num_secondary_alignments=sum(bool(line.flag & SECONDARY) for line in mapped),
        num_supplementary_alignments=sum(bool(line.flag & SUPPLEMENTARY) for line in mapped),
    )


def _substitutions(line: SamLine, gaps: int) -> int:
    """Count the aligned bases that differ from the reference: from MD, else from =/X, else from NM."""
    if (md := line.value("MD")) is not None:
        return sum(character.isalpha() for character in re.sub(r"\^[A-Za-z]+", "", md))
    if line.count("=X"):
        return line.count("X")
    return max(int(line.value("NM") or gaps) - gaps, 0)


def reverse_complement(sequence: bytes) -> bytes:
    """Return the other strand of a sequence of A, C, G, T, U and N."""
    return sequence.translate(_COMPLEMENT)[::-1]


_COMPLEMENT = bytes.maketrans(b"ACGTUN", b"TGCAAN")
