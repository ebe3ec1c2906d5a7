"""Walltimes, lifetimes, and how many workers."""

from __future__ import annotations

import pytest

from tasks.core.errors import SettingsError
from tasks.core.resources import PoolState, correction, format_walltime, lifetime, parse_walltime, workers_at_once


@pytest.mark.parametrize(
    ("text", "seconds", "written"),
    [
        ("1-00:00:00", 86_400, "1-00:00:00"),
        ("00-00:10:00", 600, "0-00:10:00"),
        ("2-03:04:05", 183_845, "2-03:04:05"),
        ("24:00:00", 86_400, "1-00:00:00"),
        ("100:00:00", 360_000, "4-04:00:00"),
        ("12:30:00", 45_000, "0-12:30:00"),
        ("90:00", 5400, "0-01:30:00"),
        ("10:30", 630, "0-00:10:30"),
        ("7", 604_800, "7-00:00:00"),
        (" 1 ", 86_400, "1-00:00:00"),
    ],
)
def test_walltimes(text: str, seconds: int, written: str) -> None:
    assert parse_walltime(text) == seconds
    assert format_walltime(seconds) == written


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no walltime; write dd-hh:mm:ss"),
        ("1h", "'1h' is no walltime"),
        ("1-12", "'1-12'"),
        ("1-2:00", "'1-2:00'"),
        ("-1:00", "'-1:00'"),
        ("1:2:3:4", "'1:2:3:4'"),
        ("00:61", "61 seconds, where there are at most 59"),
        ("1:75:00", "75 minutes"),
        ("1-24:00:00", "24 hours"),
        ("0", "no time at all"),
        ("0-00:00:00", "no time at all"),
    ],
)
def test_what_is_no_walltime(text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        parse_walltime(text)


@pytest.mark.parametrize(
    ("walltime", "number", "drain", "seconds"),
    [
        (86_400, 0, None, 84_600),  # half an hour kept
        (600, 0, None, 450),  # a quarter kept
        (600, 4, None, 450 - 22),  # those that began together don't leave together
        (600, 8, None, 450),
        (600, 0, 30, 570),
        (60, 0, 100, 1),
    ],
)
def test_lifetimes_end_before_the_allocation(walltime: int, number: int, drain: int | None, seconds: int) -> None:
    assert lifetime(walltime, number, drain) == seconds


@pytest.mark.parametrize(
    ("total", "threads", "workers"), [(0, 7, 16), (21, 7, 3), (20, 7, 2), (7, 7, 1), (1000, 1, 16)]
)
def test_a_limit_on_threads(total: int, threads: int, workers: int) -> None:
    assert workers_at_once(total_threads=total, threads=threads, maximum=16) == workers


def test_a_limit_too_small_for_one_task() -> None:
    with pytest.raises(SettingsError, match="6 is less than the 7 threads that one task needs"):
        workers_at_once(total_threads=6, threads=7, maximum=16)


def pool(maximum: int, workers: int = 0, idle: int = 0, aside: int = 0) -> PoolState:
    return PoolState(maximum=maximum, workers=workers, idle=idle, aside=aside)


@pytest.mark.parametrize(
    ("pools", "bundles", "slots", "add", "drop"),
    [
        ([pool(4)], 10, 1, [4], [0]),
        ([pool(4)], 2, 1, [2], [0]),
        ([pool(4)], 3, 2, [2], [0]),  # two bundles a worker
        ([pool(4)], 0, 1, [0], [0]),
        ([pool(4, 4)], 10, 1, [0], [0]),
        ([pool(4, 4, 1)], 10, 1, [0], [0]),  # idle for a moment, with work for all
        ([pool(4, 4, 3)], 1, 1, [0], [3]),
        ([pool(4, 4, 1)], 1, 1, [0], [1]),  # busy ones stay
        ([pool(4, 4, 4)], 0, 1, [0], [4]),
        ([pool(4), pool(8)], 12, 1, [4, 8], [0, 0]),
        ([pool(4), pool(8)], 3, 1, [1, 2], [0, 0]),  # both partitions are asked
        ([pool(4, 4), pool(8)], 6, 1, [0, 2], [0, 0]),
        ([pool(4, 2, 2), pool(8, 2, 2)], 1, 1, [0, 0], [1, 2]),  # the pools named first keep theirs
    ],
)
def test_pools_share_one_queue(
    pools: list[PoolState], bundles: int, slots: int, add: list[int], drop: list[int]
) -> None:
    assert correction(pools, bundles=bundles, slots=slots, minimum=0, maximum=12) == (add, drop)


@pytest.mark.parametrize(
    ("minimum", "maximum", "workers", "idle", "bundles", "add", "drop"),
    [(2, 4, 0, 0, 0, 2, 0), (2, 4, 4, 4, 0, 0, 2), (2, 4, 0, 0, 100, 4, 0), (9, 4, 0, 0, 0, 4, 0)],
)
def test_minimum_and_maximum(
    minimum: int, maximum: int, workers: int, idle: int, bundles: int, add: int, drop: int
) -> None:
    made = correction([pool(10, workers, idle)], bundles=bundles, slots=1, minimum=minimum, maximum=maximum)
    assert made == ([add], [drop])


@pytest.mark.parametrize(
    ("pools", "bundles", "add", "drop"),
    [
        ([pool(2, 0, 0, 1)], 1, [1], [0]),  # who is set aside does not call it
        ([pool(2, 1, 1, 1)], 1, [0], [0]),  # nor is the other one idle for good
        ([pool(2, 1, 1, 1)], 0, [0], [1]),
        ([pool(3, 1, 0, 1)], 9, [1], [0]),  # and keeps its place
        ([pool(2, 0, 0, 2)], 9, [0], [0]),
        ([pool(4, 1, 0, 1), pool(4, 0, 0, 3)], 9, [1, 1], [0, 0]),
        ([pool(4, 0, 0, 4), pool(8)], 9, [0, 3], [0, 0]),  # of 7 in all
        ([pool(4), pool(8, 0, 0, 7)], 9, [0, 0], [0, 0]),
    ],
)
def test_who_is_set_aside_is_no_worker_and_keeps_its_place(
    pools: list[PoolState], bundles: int, add: list[int], drop: list[int]
) -> None:
    assert correction(pools, bundles=bundles, slots=1, minimum=0, maximum=7) == (add, drop)
