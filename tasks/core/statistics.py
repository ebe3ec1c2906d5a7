"""Figures and small plots of a run, from the lengths and qscores of its records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import log10

import numpy as np
import numpy.typing as npt

#: Size of a plot, pixels; and the room left for its scales.
WIDTH, HEIGHT = 560, 220
LEFT, BOTTOM, TOP = 48, 40, 26
BAR, INK = "#3b6ea5", "#444"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordStatistics:
    """What people ask first about a run."""

    records: int
    passed: int
    bases: int
    #: Half of all bases lie in records at least this long.
    n50: int
    longest: int
    #: Of the mean error probability, each record counting the same, Phred; None without records.
    mean_qscore: float | None
    median_qscore: float | None


def record_statistics(
    lengths: npt.NDArray[np.int64], qscores: npt.NDArray[np.float64], passes: npt.NDArray[np.bool_]
) -> RecordStatistics:
    """Sum up records; all arrays have shape (records,), qscores are mean qscores in Phred."""
    some = len(lengths) > 0
    return RecordStatistics(
        records=len(lengths),
        passed=int(passes.sum()),
        bases=int(lengths.sum()),
        n50=n50(lengths),
        longest=int(lengths.max()) if some else 0,
        mean_qscore=float(-10 * np.log10(np.mean(10 ** (-qscores / 10)))) if some else None,
        median_qscore=float(np.median(qscores)) if some else None,
    )


def n50(lengths: npt.NDArray[np.int64]) -> int:
    """Return the length at which records, longest first, hold half of all bases; 0 without bases."""
    if not len(lengths) or not lengths.sum():
        return 0
    descending = np.sort(lengths)[::-1]
    covered = np.cumsum(descending)
    return int(descending[np.searchsorted(covered, covered[-1] / 2)])


def histogram_svg(
    values: npt.NDArray[np.float64],
    *,
    title: str,
    unit: str,
    weights: npt.NDArray[np.float64] | None = None,
    logarithmic: bool = False,
    bins: int = 56,
) -> str:
    """Draw a histogram as SVG; an empty one says so."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/><text x="{LEFT}" y="16" font-size="13">{title}</text>',
    ]
    kept = values > 0 if logarithmic else np.isfinite(values)
    shown = np.log10(values[kept]) if logarithmic else values[kept]
    if not len(shown):
        return "".join([*parts, f'<text x="{LEFT}" y="{HEIGHT / 2}">no records</text></svg>'])
    counts, edges = np.histogram(shown, bins=bins, weights=None if weights is None else weights[kept])
    width, height = (WIDTH - LEFT - 10) / bins, HEIGHT - TOP - BOTTOM
    top = max(float(counts.max()), 1e-9)
    for number, count in enumerate(counts.tolist()):
        tall = height * count / top
        parts.append(
            f'<rect x="{LEFT + number * width:.1f}" y="{TOP + height - tall:.1f}" width="{width - 1:.1f}" '
            f'height="{tall:.1f}" fill="{BAR}"/>'
        )
    low, high = float(edges[0]), float(edges[-1])
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = low + share * (high - low)
        x = LEFT + share * (WIDTH - LEFT - 10)
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        label = short(10**at if logarithmic else at)
        parts.append(f'<text x="{x:.0f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{label}</text>')
    parts.append(f'<text x="{LEFT + (WIDTH - LEFT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{unit}</text>')
    parts.append(f'<text x="{LEFT - 6}" y="{TOP + 10}" text-anchor="end">{short(top)}</text></svg>')
    return "".join(parts)


def short(value: float) -> str:
    """Write a figure in four characters or so: 950, 1.2k, 34M, 5.6G."""
    if value < 1000:
        return f"{value:.3g}"
    power = min(int(log10(value) // 3), 4)
    return f"{value / 1000**power:.3g}{'kMGT'[power - 1]}"


def covered_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Return for how long any of some spans of time, (begin, end), was going on."""
    covered, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return covered
