"""The file that training needs: reads aligned with their calls, levels, and new sequences."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from infra.training.levels import Bools, Levels
from infra.training.reads import CalledRead, SegmentedRead
from infra.training.squiggles import Sequences


@dataclass(frozen=True, slots=True)
class Prepared:
    """What chunks are made of (squiggles.py), and the reads that judge a training."""

    reads: list[SegmentedRead]
    states: list[Bools]
    levels: Levels
    sequences: Sequences
    validation: list[CalledRead]

    def save(self, path: Path) -> None:
        """Write as .npz; levels of new sequences in half precision."""
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
        sequences = Sequences(arrays["bases"], arrays["levels"].astype(np.float32))
        validation = reads("validation", CalledRead)
        return cls(reads("read", SegmentedRead), all_of("state"), levels, sequences, validation)
