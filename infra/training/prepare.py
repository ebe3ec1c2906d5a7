"""Reads and calls to the file that training needs: `python -m infra.training.prepare --help`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

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
    moves_of,
    surroundings,
)
from infra.training.reads import (
    HELD_OUT,
    VALIDATION,
    CalledRead,
    Floats,
    SegmentedRead,
    kmers_of,
    level_table,
    sq_f5c,
)
from infra.training.squiggles import Sequences, new_sequences

logger = logging.getLogger(__name__)
#: Events shorter than this tell too little of where their level lies.
_LEAST = 6


@dataclass(frozen=True, slots=True)
class Prepared:
    """What chunks are made of (squiggles.py), and the reads that judge a training."""

    reads: list[SegmentedRead]
    states: list[Bools]
    levels: Levels
    sequences: Sequences
    validation: list[CalledRead]

    def save(self, path: Path) -> None:
        """Write as .npz."""
        arrays: dict[str, Any] = {"loudness": self.levels.loudness, "tables": self.levels.tables}
        arrays |= {"bases": self.sequences.bases, "levels": self.sequences.levels.astype(np.float16)}
        arrays |= {f"layer{i}": layer for i, layer in enumerate(self.levels.layers)}
        arrays |= {f"state{i}": state for i, state in enumerate(self.states)}
        named: dict[str, SegmentedRead | CalledRead] = {f"read{i}": read for i, read in enumerate(self.reads)}
        named |= {f"validation{i}": read for i, read in enumerate(self.validation)}
        for name, one in named.items():
            arrays |= {f"{name}.{field.name}": getattr(one, field.name) for field in fields(one)}
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Prepared:
        """Read what `save` wrote."""
        with np.load(path) as file:
            arrays = {name: array if array.ndim else array.item() for name, array in file.items()}

        def all_of(kind: str) -> list[Any]:
            return [arrays[f"{kind}{i}"] for i in range(len(arrays)) if f"{kind}{i}" in arrays]

        def reads(kind: str, of: type[SegmentedRead | CalledRead]) -> list[Any]:
            counts = range(sum(name.startswith(kind) and name.endswith(".bases") for name in arrays))
            return [of(**{field.name: arrays[f"{kind}{i}.{field.name}"] for field in fields(of)}) for i in counts]

        levels = Levels(arrays["tables"], arrays["loudness"], all_of("layer"))
        loudness = levels.loudness[kmers_of(arrays["bases"])]
        sequences = Sequences(arrays["bases"], arrays["levels"].astype(np.float32), loudness)
        validation = reads("validation", CalledRead)
        return cls(reads("read", SegmentedRead), all_of("state"), levels, sequences, validation)


def learning(reads: Sequence[SegmentedRead], states: Sequence[Bools], table: Floats) -> tuple[Floats, Floats, Floats]:
    """Return of the usual state's events what lies about them, the moves, and how far off the table they lie."""
    about, moves, off = [], [], []
    for read, other in zip(reads, states, strict=True):
        level = table[kmers_of(read.bases)]
        here = good(read, _LEAST) & ~other
        about.append(surroundings(read.bases, slice(0, len(level)))[here])
        moves.append(moves_of(level)[here])
        off.append((read.offsets / read.gain + read.level - level)[here])
    return np.concatenate(about), np.concatenate(moves), np.concatenate(off).astype(np.float32)


def fitted(
    reads: Sequence[SegmentedRead], states: Sequence[Bools], table: Floats, *, hidden: int, epochs: int, seed: int
) -> list[Floats]:
    """Fit the network of `Levels.layers`."""
    torch.manual_seed(seed)
    about, moves, off = map(torch.from_numpy, learning(reads, states, table))
    sizes = [4 * (LAST - FIRST), hidden, hidden, MOVES]
    linear = [nn.Linear(*pair) for pair in pairwise(sizes)]
    network = nn.Sequential(linear[0], nn.ReLU(), nn.Dropout(0.2), linear[1], nn.ReLU(), nn.Dropout(0.2), linear[2])
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.1)
    batches = len(off) // 512
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=epochs * batches)
    for _ in range(epochs):
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
        table = levels.tables[0, kmers_of(read.bases)]
        here = good(read, _LEAST) & ~other
        off = (read.offsets / read.gain + read.level - table)[here]
        left += float(np.var(off - levels.moved(read.bases, table)[here]) * here.sum())
        total += float(np.var(off) * here.sum())
    return 1 - left / total


def main() -> None:
    """Prepare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of sq_f5c's reads, calls and moves")
    parser.add_argument("--table", type=Path, required=True, help="uncalled4's dna_r10.4.1_400bps_9mer.npz")
    parser.add_argument("--out", type=Path, required=True, help=".npz to write")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--pieces", type=int, default=1500, help="of 4,000 bases, of which chunks are made")
    parser.add_argument("--rounds", type=int, default=5, help="of fitting and aligning")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    table, loudness = level_table(options.table)
    called = [read for read in sq_f5c(options.data) if not read.read_id.startswith(HELD_OUT)]
    validation = [read for read in called if read.read_id.startswith(VALIDATION)]
    called = [read for read in called if not read.read_id.startswith(VALIDATION)]
    reads, states, levels = in_both_states(called, table, loudness)
    judges = [in_both_states([read], table, loudness)[1][0] for read in validation]
    for seed in range(1, options.rounds + 1):
        layers = fitted(reads, states, table, hidden=options.hidden, epochs=options.epochs, seed=seed)
        levels = Levels(levels.tables, loudness, layers)
        reads = aligned(called, states, levels)
        shares = explained(levels, reads, states), explained(levels, aligned(validation, judges, levels), judges)
        logger.info("of the levels' variance about the table's explained: %.3f; in validation reads %.3f", *shares)
    sequences = new_sequences([read.bases for read in reads], levels, np.random.default_rng(1), options.pieces)
    Prepared(reads, states, levels, sequences, validation).save(options.out)


if __name__ == "__main__":
    main()
