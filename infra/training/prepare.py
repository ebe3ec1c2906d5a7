"""Reads and calls to the file that training needs: `python -m infra.training.prepare --help`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from infra.training.levels import (
    FIRST,
    LAST,
    MOVES,
    Bools,
    Levels,
    aligned,
    good,
    in_both_states,
    in_other_state,
    moves_of,
    surroundings,
)
from infra.training.prepared import Prepared
from infra.training.reads import (
    HELD_OUT,
    VALIDATION,
    Floats,
    SegmentedRead,
    kmers_of,
    level_table,
    segmented,
    sq_f5c,
)
from infra.training.squiggles import new_sequences

logger = logging.getLogger(__name__)
#: Events shorter than this tell too little of where their level lies.
_LEAST = 6
#: Of the network that tells how far levels move: width, epochs, and rounds of fitting it and aligning by it.
_HIDDEN, _EPOCHS, _ROUNDS = 128, 25, 5
#: Pieces of new sequence.
_PIECES = 1500


def off_table(read: SegmentedRead, other: Bools, table: Floats) -> tuple[Bools, Floats]:
    """Return which events of a read tell of the usual state's levels, and how far off the table these lie."""
    here = good(read, _LEAST) & ~other
    return here, (read.offsets / read.gain + read.level - table[kmers_of(read.bases)])[here].astype(np.float32)


def fitted(reads: Sequence[SegmentedRead], states: Sequence[Bools], table: Floats, seed: int) -> list[Floats]:
    """Fit the network of `Levels.layers`."""
    torch.manual_seed(seed)
    parts: list[tuple[Floats, Floats, Floats]] = []
    for read, other in zip(reads, states, strict=True):
        level = table[kmers_of(read.bases)]
        here, lies = off_table(read, other, table)
        parts.append((surroundings(read.bases, slice(0, len(level)))[here], moves_of(level)[here], lies))
    about, moves, off = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    sizes = [4 * (LAST - FIRST), _HIDDEN, _HIDDEN, MOVES]
    linear = [nn.Linear(*pair) for pair in pairwise(sizes)]
    network = nn.Sequential(linear[0], nn.ReLU(), nn.Dropout(0.2), linear[1], nn.ReLU(), nn.Dropout(0.2), linear[2])
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.1)
    batches = len(off) // 512
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=_EPOCHS * batches)
    for _ in range(_EPOCHS):
        for some in torch.randperm(len(off))[: batches * 512].view(batches, 512):
            loss = ((network(about[some]) * moves[some]).sum(1) - off[some]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return [array.detach().numpy().copy() for layer in linear for array in (layer.weight.T, layer.bias)]


def explained(levels: Levels, reads: Sequence[SegmentedRead], states: Sequence[Bools]) -> float:
    """Return which share of the variance of the usual state's levels about the table's the levels explain."""
    left = total = 0.0
    for read, other in zip(reads, states, strict=True):
        here, off = off_table(read, other, levels.tables[0])
        moved = levels.moved(read.bases, levels.tables[0, kmers_of(read.bases)])[here]
        left += float(np.var(off - moved) * len(off))
        total += float(np.var(off) * len(off))
    return 1 - left / total


def main() -> None:
    """Prepare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of sq_f5c's reads, calls and moves")
    parser.add_argument("--table", type=Path, required=True, help="uncalled4's dna_r10.4.1_400bps_9mer.npz")
    parser.add_argument("--out", type=Path, required=True, help=".npz to write")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    table, loudness = level_table(options.table)
    called = [read for read in sq_f5c(options.data) if not read.read_id.startswith(HELD_OUT)]
    validation = [read for read in called if read.read_id.startswith(VALIDATION)]
    called = [read for read in called if not read.read_id.startswith(VALIDATION)]
    reads, states, levels = in_both_states(called, table, loudness)
    judges = [in_other_state(segmented(read, table[kmers_of(read.bases)])) for read in validation]
    for seed in range(1, _ROUNDS + 1):
        levels = Levels(levels.tables, loudness, fitted(reads, states, table, seed))
        reads = aligned(called, states, levels)
        shares = explained(levels, reads, states), explained(levels, aligned(validation, judges, levels), judges)
        logger.info("of the levels' variance about the table's explained: %.3f; in validation reads %.3f", *shares)
    sequences = new_sequences([read.bases for read in reads], levels, np.random.default_rng(1), _PIECES)
    Prepared(reads, states, levels, sequences, validation).save(options.out)


if __name__ == "__main__":
    main()
