"""How right a model's calls are, how fast it calls, and whether its scores say so.

    python -m tests.benchmarks.accuracy [--model NAME|DIR] [--int8] [--calibrate]

Calls the six reads of sq_f5c (R10.4.1, 4 kHz; MIT) that no training sees, and slorado's read (5 kHz; MIT), with the
embedded engine, and compares each with its published call, adapters and all: matches per alignment column, aligned
from end to end by edlib, and by mappy's best hit, with the share of the call that it covers. Speed is samples per CPU
second. The last table sets the error that the scores of bases promise against the one observed. `--calibrate` gives,
instead, the line `qscore` that a model's description should have, found on the two validation reads.
"""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import edlib
import mappy
import numpy as np
from rich.console import Console
from rich.table import Table

from infra.training.reads import HELD_OUT, VALIDATION
from tasks.core.reads import Read
from tasks.engines.catalogue import Model, find_model
from tasks.engines.cpu import CpuEngine
from tasks.formats.pod5 import read_rows, scan_pod5
from tests.data import SHARED

SETS = (
    ("sq_f5c, 4 kHz", "r10_4khz/sq_f5c_reads", HELD_OUT),
    ("slorado, 5 kHz", "r10_5khz/slorado_one_5khz", ("",)),
)
BINS = (0, 3, 5, 7, 9, 12, 15, 20, 99)


def reads_of(pod5: Path, starts: tuple[str, ...]) -> list[Read]:
    """Read the reads whose ids start so."""
    rows = read_rows(str(pod5), 0, len(scan_pod5(pod5).read_ids))
    return [read for read in rows if isinstance(read, Read) and read.read_id.startswith(starts)]


def reads_and_truths(stem: str, starts: tuple[str, ...]) -> tuple[list[Read], dict[str, str]]:
    """Read the reads of a set whose ids start so, and the published calls of the set."""
    pod5 = SHARED / "data" / f"{stem}.pod5"
    return reads_of(pod5, starts), truths_of(pod5.with_name(f"{pod5.stem}.truth.fastq"))


def truths_of(fastq: Path) -> dict[str, str]:
    """Read the published calls."""
    lines = fastq.read_text().splitlines()
    return {name[1:].split()[0]: sequence for name, sequence in zip(lines[::4], lines[1::4], strict=True)}


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name of a bundled model, or a model directory; default: the default model")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--calibrate", action="store_true")
    given = parser.parse_args()
    model = find_model(given.model)
    if given.calibrate:
        Console().print(f"qscore = {calibrated(model, int8=given.int8)}", markup=False)
        return
    engine = CpuEngine(model, int8=given.int8)
    table = Table(title=f"{model.name} {model.digest[:12]}{' int8' if given.int8 else ''}")
    for name in ("set", "read", "bases", "identity, end to end", "identity, mapped", "aligned", "mean qscore"):
        table.add_column(name)
    promised, wrong = [], []
    for title, stem, starts in SETS:
        reads, truths = reads_and_truths(stem, starts)
        began = time.process_time()
        answers = list(engine.basecall(reads))
        spent = time.process_time() - began
        columns = matches = mapped_columns = mapped_matches = covered = bases = 0
        mapped_reads = 0
        for read, outcome in answers:
            if not outcome.calls:
                table.add_row(title, read.read_id[:8], outcome.reason)
                continue
            call = outcome.calls[0]
            sequence, truth = call.sequence.decode(), truths[read.read_id]
            good, length, right = end_to_end(sequence, truth)
            hits = list(mappy.Aligner(seq=truth, preset="map-ont", k=11, w=5, min_chain_score=20).map(sequence))
            best = max(hits, key=lambda hit: int(hit.blen), default=None)
            share = sum(hit.q_en - hit.q_st for hit in hits if hit.is_primary) / len(sequence)
            mapped = best.mlen / best.blen if best else 0.0
            table.add_row(
                title,
                read.read_id[:8],
                f"{len(sequence):,}",
                f"{good / length:.4f}",
                f"{mapped:.4f}",
                f"{min(share, 1.0):.3f}",
                f"{call.mean_qscore:.2f}",
            )
            columns, matches, bases = columns + length, matches + good, bases + len(sequence)
            covered += min(share, 1.0) * len(sequence)
            mapped_reads += best is not None
            mapped_columns += best.blen if best else 0
            mapped_matches += best.mlen if best else 0
            promised.append(np.frombuffer(call.qstring, np.uint8).astype(int) - 33)
            wrong.append(~right)
        table.add_row(
            f"[bold]{title}",
            f"{mapped_reads} of {len(reads)} mapped",
            f"{bases:,}",
            f"[bold]{matches / columns:.4f}",
            f"{mapped_matches / max(mapped_columns, 1):.4f}",
            f"{covered / bases:.3f}",
            f"{sum(read.num_samples for read in reads) / spent:,.0f} samples/CPU s",
            end_section=True,
        )
    console = Console()
    console.print(table)
    console.print(calibration(np.concatenate(promised), np.concatenate(wrong)))


def end_to_end(call: str, truth: str) -> tuple[int, int, np.ndarray]:
    """Align globally by least edits; return matches, columns, and which bases of the call are right.

    A base that is left out counts against the one after it, as in the scores.
    """
    right = np.zeros(len(call), bool)
    at = columns = matches = 0
    left_out = False
    for operation, length in operations_of(call, truth):
        columns += length
        if operation == "=":
            right[at : at + length] = True
            right[at] = not left_out
            matches += length
        left_out = operation == "D"
        at += 0 if left_out else length
    return matches, columns, right


def operations_of(call: str, truth: str) -> list[tuple[str, int]]:
    """Return the operations of a global alignment of least edits."""
    cigar = edlib.align(call, truth, "NW", "path")["cigar"]
    return [(operation, int(length)) for length, operation in re.findall(r"(\d+)([=XID])", cigar)]


def calibrated(model: Model, *, int8: bool) -> list[float]:
    """Fit slope and offset of observed Phred scores on the network's own, over groups of equally many bases."""
    engine = CpuEngine(replace(model, qscore=(1.0, 0.0)), int8=int8)
    reads, truths = reads_and_truths(SETS[0][1], VALIDATION)
    own, wrong = [], []
    for read, outcome in engine.basecall(reads):
        call = outcome.calls[0]
        own.append(np.frombuffer(call.qstring, np.uint8).astype(float) - 33)
        wrong.append(~end_to_end(call.sequence.decode(), truths[read.read_id])[2])
    order = np.argsort(np.concatenate(own), kind="stable")
    groups = list(zip(*(np.array_split(np.concatenate(values)[order], 24) for values in (own, wrong)), strict=True))
    observed = [-10 * np.log10((y.sum() + 0.5) / (len(y) + 1)) for _, y in groups]  # a group may have no error
    slope, offset = np.polyfit([x.mean() for x, _ in groups], observed, 1)
    return [round(float(slope), 2), round(float(offset), 2)]


def calibration(promised: np.ndarray, wrong: np.ndarray) -> Table:
    """Set promised errors against observed ones, by bins of score."""
    table = Table(title="scores of bases: error promised, error observed (wrong, too many, or after one left out)")
    for name in ("Phred", "bases", "promised", "observed"):
        table.add_column(name)
    for low, high in pairwise(BINS):
        inside = (promised >= low) & (promised < high)
        if inside.sum() >= 50:
            expected = (10.0 ** (-promised[inside] / 10)).mean()
            table.add_row(f"{low} to {high - 1}", f"{inside.sum():,}", f"{expected:.3f}", f"{wrong[inside].mean():.3f}")
    return table


if __name__ == "__main__":
    main()
