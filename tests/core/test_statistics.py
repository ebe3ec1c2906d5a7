"""Figures of a run, as tables."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from tasks.core.statistics import covered_seconds, histogram_svg, n50, record_statistics, short


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([], 0), ([0], 0), ([7], 7), ([2, 2, 2, 3, 3, 4, 8, 8], 8), ([1, 1, 1, 1], 1), ([10, 5, 5], 10), ([9, 5, 6], 6)],
)
def test_n50(lengths: list[int], expected: int) -> None:
    assert n50(np.array(lengths, np.int64)) == expected


def test_the_mean_qscore_is_of_the_errors() -> None:
    made = record_statistics(np.array([10, 30]), np.array([10.0, 20.0]), np.array([True, False]))
    assert made.mean_qscore == pytest.approx(12.596, abs=1e-3)
    assert (made.records, made.passed, made.bases, made.n50, made.longest) == (2, 1, 40, 30, 30)
    none = record_statistics(np.array([], np.int64), np.array([]), np.array([], bool))
    assert (none.records, none.mean_qscore, none.n50) == (0, None, 0)


@pytest.mark.parametrize("values", [[], [5.0], [1.0, 10.0, 1000.0], [0.0, 3.0]])
def test_plots_are_svg(values: list[float]) -> None:
    drawn = ET.fromstring(histogram_svg(np.array(values), title="lengths", unit="bases", logarithmic=True))
    assert drawn.tag.endswith("svg")


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (950, "950"), (1234, "1.23k"), (34e6, "34M"), (5.6e9, "5.6G"), (2e15, "2e+03T")]
)
def test_short_figures(value: float, text: str) -> None:
    assert short(value) == text


def test_a_pause_between_batches_does_not_count_as_calling() -> None:
    assert covered_seconds([]) == 0
    assert covered_seconds([(10, 20), (12, 15), (18, 25), (1000, 1005)]) == 20
