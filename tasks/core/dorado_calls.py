"""From what the basecall server returns to calls.

The keys are those of the published client library. Any of them may be missing: what is needed and not there is a
ValueError that names it, and then the read is quarantined, never guessed at.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.core.calls import Barcode, BasecalledRead, ModifiedBases, Outcome, PolyTail, mean_qscore
from tasks.core.reads import Read

#: The server calls nothing shorter, samples.
MIN_SAMPLES = 100
Answer = Mapping[str, Any]

_CODES = {
    "5mC": "m",
    "5hmC": "h",
    "6mA": "a",
    "m6A": "a",
    "4mC": "21839",
    "m5C": "m",
    "inosine": "17596",
    "pseU": "17802",
    "2OmeA": "69426",
    "2OmeC": "19228",
    "2OmeG": "19229",
    "2OmeU": "19227",
}
#: One symbol of an alphabet of bases: a letter, or a ChEBI number.
_SYMBOL = re.compile(r"[A-Za-z]|\d+")


def outcome_of(
    read: Read, answers: Sequence[Answer], *, stride: int, moves: bool, mods: bool, barcodes: bool, poly_a: bool
) -> Outcome:
    """Turn the server's answers to one read into its outcome.

    Args:
        stride: Samples per move of the model; a read's own metadata wins.
        moves: The move table was asked for; likewise modified bases, barcodes and poly-A tails.

    Raises:
        ValueError: the answers contradict themselves, or lack what is needed.
    """
    check_parts(answers)
    called = [answer for answer in answers if _dataset(answer, "sequence")]
    if not called:
        return Outcome.skipped("too_short" if read.num_samples < MIN_SAMPLES else "no_bases")
    split = len(answers) > 1
    calls = tuple(
        _call(read, answer, split, stride=stride, moves=moves, mods=mods, barcodes=barcodes, poly_a=poly_a)
        for answer in called
    )
    if len({call.read_id for call in calls}) != len(calls):
        raise ValueError("parts of a split read have the same id")
    return Outcome.called(*sorted(calls, key=lambda call: (call.split_point, call.read_id)))


def parts_of(answers: Sequence[Answer]) -> int:
    """Return how many of a read's answers are the products of splitting beyond the first."""
    return sum(int(answer.get("sub_tag") or 0) != 0 for answer in answers)


def check_parts(answers: Sequence[Answer]) -> None:
    """Check the sum of one read: one that was sent, plus those split off it, are those called.

    Raises:
        ValueError: it does not hold.
    """
    tags = [int(answer.get("sub_tag") or 0) for answer in answers]
    if not answers:
        raise ValueError("no answer at all")
    if len(set(tags)) != len(tags) or 1 + parts_of(answers) != len(answers):
        raise ValueError(f"1 read and {parts_of(answers)} split off are not the {len(answers)} returned (parts {tags})")


def _call(
    read: Read,
    answer: Answer,
    split: bool,
    *,
    stride: int,
    moves: bool,
    mods: bool,
    barcodes: bool,
    poly_a: bool,
) -> BasecalledRead:
    told = _Told(answer.get("metadata") or {})
    if (parent := told.text("read_id")) and parent != read.read_id:
        raise ValueError(f"the answer is to read {parent}")
    sequence, qstring = _dataset(answer, "sequence"), _dataset(answer, "qstring")
    if len(sequence) != len(qstring):
        raise ValueError(f"{len(sequence)} bases with {len(qstring)} qualities")
    point = told.whole("split_point", -1)
    trimmed = max(told.whole("trimmed_samples", 0), 0)
    kept = told.whole("trimmed_duration", 0)
    covered = kept + trimmed if kept > 0 else told.whole("duration", 0) or read.num_samples
    start = max(point, 0)
    if start >= max(read.num_samples, 1):
        raise ValueError(f"split at sample {point} of a read of {read.num_samples}")
    covered = min(covered, read.num_samples - start)
    records = _records(told)
    sam = records[0] if records else ""
    template, complement = told.text("duplex_strand_1"), told.text("duplex_strand_2")
    duplex = 1 if template and complement else -1 if told.whole("is_duplex_parent", 0) else 0
    return BasecalledRead(
        read_id=told.text("strand_id") or (_part_id(read, answer) if split else read.read_id),
        parent_read_id=read.read_id,
        sequence=sequence,
        qstring=qstring,
        mean_qscore=told.number("mean_qscore", math.nan, default_of=lambda: mean_qscore(qstring)),
        stride=told.whole("model_stride", stride) or stride,
        trimmed_samples=trimmed,
        split_point=start,
        num_samples=covered,
        moves=_moves(answer) if moves else None,
        scaling_midpoint=told.number("scaling_median", 0.0),
        scaling_dispersion=told.number("scaling_med_abs_dev", 0.0),
        scaling_version=told.text("scaling_version") or "quantile",
        modified=_modified(answer, told, sequence, sam) if mods else None,
        barcode=_barcode(told) if barcodes else None,
        poly_tail=_poly_tail(told) if poly_a else None,
        alignments=records or None,
        duplex_parents=(template, complement) if duplex == 1 else None,
        duplex=duplex,
    )


class _Told:
    """The metadata of one answer, read with care: a key may be missing, NaN, or text where a number was expected."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def text(self, key: str) -> str:
        value = self._metadata.get(key)
        return "" if value is None else value.decode() if isinstance(value, bytes) else str(value)

    def number(self, key: str, default: float, *, default_of: Any = None) -> float:
        try:
            value = float(self._metadata[key])
        except (KeyError, TypeError, ValueError):
            value = math.nan
        if math.isnan(value):
            return float(default_of()) if default_of else default
        return value

    def whole(self, key: str, default: int) -> int:
        return int(self.number(key, default))

    def raw(self, key: str) -> Any:
        return self._metadata.get(key)


def _dataset(answer: Answer, key: str) -> bytes:
    value = (answer.get("datasets") or {}).get(key)
    if value is None:
        return b""
    return value if isinstance(value, bytes) else str(value).encode()


def _part_id(read: Read, answer: Answer) -> str:
    """Name a part whose id the server did not tell, always in the same way."""
    tag = int(answer.get("sub_tag") or 0)
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{read.read_id}.{tag}")) if tag else read.read_id


def _moves(answer: Answer) -> npt.NDArray[np.uint8]:
    value = (answer.get("datasets") or {}).get("movement")
    if value is None:
        raise ValueError("no move table, though it was asked for")
    moves: npt.NDArray[np.uint8] = np.ascontiguousarray(value, np.uint8).reshape(-1)
    return moves


def _records(told: _Told) -> tuple[str, ...]:
    value = told.raw("alignment_sam_record")
    if value is None:
        return ()
    lines = value if isinstance(value, list | tuple) else str(value).splitlines()
    records = [str(line) for line in lines if str(line).strip() and not str(line).startswith("@")]
    # The primary one first: SECONDARY is 0x100, SUPPLEMENTARY 0x800.
    return tuple(sorted(records, key=lambda line: int(line.split("\t", 2)[1]) & 0x900 != 0))


def _barcode(told: _Told) -> Barcode:
    arrangement = told.text("barcode_arrangement") or "unclassified"
    known = arrangement != "unclassified"
    return Barcode(
        arrangement=arrangement,
        kit=told.text("barcode_kit") if known else "",
        variant=told.text("barcode_variant") if known else "",
        alias=told.text("alias") if known else "",
        score=told.number("barcode_score", -1.0),
        front_score=told.number("barcode_front_score", -1.0),
        front_foundseq_length=told.whole("barcode_front_foundseq_length", -1),
        front_begin_index=told.whole("barcode_front_begin_index", -1),
        rear_score=told.number("barcode_rear_score", -1.0),
        rear_foundseq_length=told.whole("barcode_rear_foundseq_length", -1),
        rear_end_index=told.whole("barcode_rear_end_index", -1),
    )


def _poly_tail(told: _Told) -> PolyTail:
    return PolyTail(
        length=told.whole("poly_tail_length", -1),
        anchor=told.whole("poly_tail_anchor", -1),
        start=told.whole("poly_tail_start_1", -1),
        end=told.whole("poly_tail_end_1", -1),
        start_2=told.whole("poly_tail_start_2", -1),
        end_2=told.whole("poly_tail_end_2", -1),
    )


def _modified(answer: Answer, told: _Told, sequence: bytes, sam: str) -> ModifiedBases | None:
    """Take modified bases from the SAM record where it has them, else from the table of probabilities.

    None when the read has neither, as one without a base that the models look at.
    """
    if tags := _modified_of_sam(sam):
        return tags
    value = (answer.get("datasets") or {}).get("base_mod_probs")
    alphabet = told.text("base_mod_alphabet")
    if value is None or not alphabet:
        return None
    symbols = _SYMBOL.findall(alphabet)
    table: npt.NDArray[np.uint8] = np.asarray(value).astype(np.uint8, copy=False)
    if table.size != len(sequence) * len(symbols):
        raise ValueError(
            f"modified bases: {table.size} probabilities for {len(sequence)} bases and alphabet {alphabet!r}"
        )
    return modified_bases(
        table.reshape(len(sequence), len(symbols)),
        symbols,
        sequence,
        names=told.text("base_mod_long_names").split(),
        in_context=bool(re.search(r"[^_:;X\s]", told.text("base_mod_context"))),
    )


def modified_bases(
    table: npt.NDArray[np.uint8], symbols: Sequence[str], sequence: bytes, *, names: Sequence[str], in_context: bool
) -> ModifiedBases | None:
    """Write a table of probabilities as SAM does.

    Args:
        table: Probabilities in 256ths, shape (bases, symbols).
        symbols: Canonical bases, each followed by its modifications: A, C, m, h, G, T.
        names: Long names of the modifications, in their order.
        in_context: The models look at some contexts only: other bases are unknown (`?`), else not modified (`.`).
    """
    bases = np.frombuffer(sequence.replace(b"U", b"T"), np.uint8)
    long_names = iter(names)
    canonical = ""
    columns: dict[str, list[tuple[str, int]]] = {}
    for column, symbol in enumerate(symbols):
        if symbol in "ACGT":
            canonical = symbol
            continue
        name = next(long_names, "")
        if not canonical:
            raise ValueError(f"modified bases: alphabet {''.join(symbols)!r} does not begin with a base")
        code = symbol if symbol.isdigit() or symbol.islower() else _CODES.get(name, "")
        if not code:
            raise ValueError(f"modified bases: nobody knows symbol {symbol!r} ({name or 'no name'})")
        columns.setdefault(canonical, []).append((code, column))
    positions: list[str] = []
    probabilities: list[npt.NDArray[np.uint8]] = []
    for base, listed in columns.items():
        places = np.flatnonzero(bases == ord(base))
        looked_at = np.flatnonzero(table[places][:, [column for _, column in listed]].any(axis=1))
        skipped = np.diff(looked_at, prepend=-1) - 1
        text = "".join(f",{number}" for number in skipped.tolist())
        for code, column in listed:
            positions.append(f"{base}+{code}{'?' if in_context else '.'}{text};")
            probabilities.append(table[places[looked_at], column])
    if not positions:
        return None
    return ModifiedBases(positions="".join(positions), probabilities=np.concatenate(probabilities))


def _modified_of_sam(record: str) -> ModifiedBases | None:
    fields = {field[:5]: field[5:] for field in record.split("\t")[11:]}
    positions, listed = fields.get("MM:Z:"), fields.get("ML:B:")
    if positions is None or listed is None:
        return None
    values = [int(number) for number in listed.split(",")[1:]]
    return ModifiedBases(positions=positions, probabilities=np.array(values, np.uint8))
