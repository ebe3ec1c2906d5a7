"""Reads that a network finds bases in: levels that last for some samples, with noise. `making.read` is noise alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks.core.reads import Read
from tests.making import read


def squiggle(samples: int = 5000, *, number: int = 1, **changes: Any) -> Read:
    """Make a read whose level changes every 10 samples or so."""
    random = np.random.default_rng(number)
    dwell = random.integers(6, 16, samples // 6 + 1)
    levels = np.repeat(random.normal(600, 150, len(dwell)), dwell)[:samples]
    signal = np.clip(levels + random.normal(0, 12, samples), 250, 1250).astype(np.int16)
    return read(0, number=number, **{"signal": signal, **changes})
