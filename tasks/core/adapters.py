"""The ligation adapter: found at the ends of a call, and cut off.

Sequence: Oxford Nanopore's Chemistry Technical Document (CHTD_500), top strand of the adapter of kits with R10.4.1
pores (SQK-LSK114, native barcoding); those of R9.4.1 have the same end. What is cut, and what the figures of a call
then mean, is as in dorado: `trimmed_samples` counts from the read's start, and the move table covers what is left.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tasks.core.alignment import reverse_complement
from tasks.core.calls import BasecalledRead, mean_qscore

#: What the pore sees before the insert; after it comes the other strand's, of which reads mostly have a part only.
ADAPTER = b"CCTGTACTTCGTTCAGTTACGTATTGCT"
#: Bases at either end of a call that may hold it: a leader of up to twenty comes first.
WINDOW = 60
#: A base that matches counts 1, an error this much.
ERROR = -2
#: The score from which it is believed. Of 4,384 windows from within reads, called by minnow-v6, 0.2 % reach it, of 45
#: reads' fronts 26 (of a hac model's calls 33): adapters that were called badly stay.
BELIEVED = 8


def insert_of(sequence: bytes) -> slice:
    """Return where the insert lies in a call; all of it where no adapter is found, or nothing would be left."""
    front, rear = sequence[:WINDOW], reverse_complement(sequence[-WINDOW:])
    before, after = _adapter_ends(np.frombuffer(front + rear, np.uint8).reshape(2, -1))
    stop = len(sequence) - after
    return slice(before, stop) if before < stop else slice(0, len(sequence))


def without_adapters(call: BasecalledRead, starts: npt.NDArray[np.int64]) -> BasecalledRead:
    """Cut the adapters off a call.

    Args:
        call: As the engine called it.
        starts: Of each base, the stride of the call's own signal in which it starts; shape (bases,), ascending.
    """
    insert = insert_of(call.sequence)
    if insert == slice(0, len(call.sequence)):
        return call
    first = int(starts[insert.start]) if insert.start else 0
    behind = int(starts[insert.stop]) if insert.stop < len(call.sequence) else None
    qstring = call.qstring[insert]
    return replace(
        call,
        sequence=call.sequence[insert],
        qstring=qstring,
        mean_qscore=mean_qscore(qstring),
        trimmed_samples=call.trimmed_samples + first * call.stride,
        moves=None if call.moves is None else call.moves[first:behind],
    )


def _adapter_ends(windows: npt.NDArray[np.uint8]) -> list[int]:
    """Return of each window, shape (windows, bases), how many bases end with an adapter that is believed; else 0.

    Local alignment (Smith and Waterman, 1981) that may begin anywhere in the adapter, for its beginning is called badly
    or was not read, and goes to its end, where the insert begins.
    """
    gaps = ERROR * np.arange(windows.shape[1] + 1)
    matched = {base: np.where(windows == base, 1, ERROR) for base in b"ACGT"}
    scores = np.zeros((len(windows), len(gaps)), int)
    for base in ADAPTER:
        lacking = np.maximum(scores + ERROR, 0)
        lacking[:, 1:] = np.maximum(lacking[:, 1:], scores[:, :-1] + matched[base])
        scores = np.maximum.accumulate(lacking - gaps, axis=1) + gaps
    ends = scores.argmax(axis=1)
    return [int(end) if of_window[end] >= BELIEVED else 0 for end, of_window in zip(ends, scores, strict=True)]
