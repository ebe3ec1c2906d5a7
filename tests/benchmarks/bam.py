"""What writing BAM costs: CPU seconds per GB of FASTQ that the same calls would make, and the size.

    python -m tests.benchmarks.bam [--reads 2000] [--bases 4000]

Calls are made up by the null engine; moves and modified bases (5mC and 5hmC in CpG) are drawn at the density of real
ones. Each row is the best of three; the first is FASTQ, for comparison.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from rich.console import Console
from rich.table import Table

from tasks.core.calls import BasecalledRead, EngineIdentity, ModifiedBases
from tasks.core.reads import Read
from tasks.engines.null import NULL_IDENTITY, SAMPLES_PER_BASE, NullEngine
from tasks.formats.bam import BamEncoder, header, read_group_line, write_header
from tasks.formats.bgzf import BgzfWriter
from tasks.formats.fastq import FastqFormatter
from tests.making import read, run_info

IDENTITY: EngineIdentity = replace(NULL_IDENTITY, stride=6)
RUN = run_info()
#: Records that are compressed at once, as in split.
TOGETHER = 64

Called = list[tuple[Read, BasecalledRead]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reads", type=int, default=2000)
    parser.add_argument("--bases", type=int, default=4000, help="per read")
    given = parser.parse_args(arguments)
    plain = make(given.reads, given.bases)
    formatter = FastqFormatter(RUN, IDENTITY, "minknow")
    fastq = sum(len(formatter.record(*one)) for one in plain)
    moved = [(raw, with_moves(call, raw)) for raw, call in plain]
    modified = [(raw, with_modified(call)) for raw, call in plain]
    both = [(raw, with_modified(call)) for raw, call in moved]
    cases: dict[str, Callable[[], int]] = {
        "FASTQ": lambda: write(plain, formatter.record, b""),
        "BAM": lambda: write_bam(plain),
        "BAM, modified bases": lambda: write_bam(modified),
        "BAM, moves": lambda: write_bam(moved),
        "BAM, moves and modified bases": lambda: write_bam(both),
    }
    table = Table("output", "CPU s per GB of FASTQ", "size / FASTQ")
    for name, run in cases.items():
        seconds, size = min(timed(run) for _ in range(3))
        table.add_row(name, f"{seconds / fastq * 1e9:.1f}", f"{size / fastq:.2f}")
    Console().print(table)


def timed(run: Callable[[], int]) -> tuple[float, int]:
    """Return the CPU seconds that a run took, and what it returned."""
    began = time.process_time()
    size = run()
    return time.process_time() - began, size


def write_bam(called: Called) -> int:
    """Write a BAM file into memory; return its size, bytes."""
    encoder = BamEncoder(RUN, IDENTITY, {})
    return write(called, encoder.records, header(IDENTITY, [read_group_line(RUN, IDENTITY)], {}))


def write(called: Called, format_one: Callable[[Read, BasecalledRead], bytes], head: bytes) -> int:
    """Format and compress into memory; return the size, bytes."""
    target = io.BytesIO()
    writer = BgzfWriter(target)
    write_header(writer, head)
    for at in range(0, len(called), TOGETHER):
        writer.write(b"".join([format_one(raw, call) for raw, call in called[at : at + TOGETHER]]))
    writer.close()
    return target.tell()


def make(reads: int, bases: int) -> Called:
    """Make up calls around a length."""
    lengths = np.random.default_rng(1).gamma(4, bases / 4, reads).astype(int) + 100
    raws = [read(int(length * SAMPLES_PER_BASE), number=i, run=RUN) for i, length in enumerate(lengths, 1)]
    return [(raw, outcome.calls[0]) for raw, outcome in NullEngine().basecall(raws)]


def with_moves(call: BasecalledRead, raw: Read) -> BasecalledRead:
    """Spread the bases over the strides of the signal."""
    strides = raw.num_samples // IDENTITY.stride
    moves = np.zeros(strides, np.uint8)
    moves[np.random.default_rng(raw.read_number).choice(strides, len(call.sequence), replace=False)] = 1
    return replace(call, moves=moves)


def with_modified(call: BasecalledRead) -> BasecalledRead:
    """Give every C of a CpG two likelihoods, most of them near 0 or 255."""
    bases = np.frombuffer(call.sequence + b"N", np.uint8)
    cytosines = np.flatnonzero(bases == ord("C"))
    in_cpg = np.flatnonzero(bases[cytosines + 1] == ord("G"))
    skipped = ",".join(map(str, np.diff(in_cpg, prepend=-1) - 1))
    likely = np.random.default_rng(len(bases)).beta(0.2, 0.2, 2 * len(in_cpg)) * 255
    return replace(
        call,
        modified=ModifiedBases(positions=f"C+h?,{skipped};C+m?,{skipped};", probabilities=likely.astype(np.uint8)),
    )


if __name__ == "__main__":
    main()
