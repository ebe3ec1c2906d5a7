"""What a stage asks a batch system for, and how many workers it should have: arithmetic without a cluster."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.core.errors import SettingsError

_DAY = 86_400
#: Time before the end of an allocation in which a worker takes no new bundle: a quarter of it, but at most this.
MOST_DRAIN = 1800


def parse_walltime(text: str) -> int:
    """Return the seconds that a walltime means: `dd-hh:mm:ss`, `hh:mm:ss`, `mm:ss`, or days alone.

    Raises:
        SettingsError: it is none of these, or not more than nothing.
    """
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)|(\d+)", text.strip())
    if match is None:
        raise SettingsError(f"{text!r} is no walltime; write dd-hh:mm:ss, hh:mm:ss, mm:ss, or days alone")
    days, hours, minutes, seconds, alone = (int(group or 0) for group in match.groups())
    limits = [("seconds", seconds, 60)]
    if match[2]:
        limits.append(("minutes", minutes, 60))
    if match[1]:
        limits.append(("hours", hours, 24))
    for name, value, limit in limits:
        if value >= limit:
            raise SettingsError(f"{text!r} is no walltime: {value} {name}, where there are at most {limit - 1}")
    total = (days + alone) * _DAY + hours * 3600 + minutes * 60 + seconds
    if not total:
        raise SettingsError(f"{text!r} is no walltime: it is no time at all")
    return total


def format_walltime(seconds: int) -> str:
    """Write seconds as Slurm takes them, `dd-hh:mm:ss`."""
    days, rest = divmod(seconds, _DAY)
    return f"{days}-{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"


def lifetime(walltime: int, number: int, drain: int | None = None) -> int:
    """Return after how many seconds a worker takes no more bundles, so that none is cut by the end of its allocation.

    Workers that began together leave one after another: what one of them leaves behind, another must take.

    Args:
        walltime: Of the allocation, seconds.
        number: The worker's number.
        drain: Seconds kept for the last bundle; None: a quarter of the walltime, half an hour at most.
    """
    kept = min(walltime // 4, MOST_DRAIN) if drain is None else drain
    whole = max(walltime - kept, 1)
    return whole - (number % 8) * (whole // 10) // 8


def workers_at_once(*, total_threads: int, threads: int, maximum: int) -> int:
    """Return how many workers a limit on threads allows; a limit of 0 is none.

    Raises:
        SettingsError: the limit is less than what one worker needs.
    """
    if not total_threads:
        return maximum
    if total_threads < threads:
        raise SettingsError(
            f"total_threads: {total_threads} is less than the {threads} threads that one task needs; "
            f"give at least {threads}, or 0 for no limit"
        )
    return min(maximum, total_threads // threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """Workers of one pool, asked for or there."""

    maximum: int
    #: Asked for or there, and not set aside.
    workers: int
    #: Those of them that have had nothing to do for long enough.
    idle: int
    #: Set aside: they get nothing to do, and keep their places.
    aside: int = 0

    @property
    def room(self) -> int:
        """Places for workers that are not set aside."""
        return self.maximum - self.aside


def correction(
    pools: Sequence[PoolState], *, bundles: int, slots: int, minimum: int, maximum: int
) -> tuple[list[int], list[int]]:
    """Return how many workers each pool should add, and how many of its idle ones it should give back.

    One queue of bundles feeds all pools. New workers are spread over the pools by how empty each is: any of them may
    have to wait long for its partition. A worker is given back only when it is idle and there is work for fewer. Those
    that are set aside do no work and take their places from the others.

    Args:
        bundles: Bundles not finished, running ones included; without those that run on workers that are set aside.
        slots: Bundles that a worker runs at once.
        minimum: Workers kept, whatever there is to do.
        maximum: Workers in all pools together, those that are set aside included.
    """
    most = maximum - sum(pool.aside for pool in pools)
    wanted = min(most, max(-(-bundles // slots), minimum))
    have = [pool.workers for pool in pools]
    add = [0] * len(pools)
    while sum(have) < wanted:
        room = [number for number, pool in enumerate(pools) if have[number] < pool.room]
        if not room:
            break
        emptiest = min(room, key=lambda number: have[number] / pools[number].room)
        have[emptiest] += 1
        add[emptiest] += 1
    drop = [0] * len(pools)
    for number in reversed(range(len(pools))):
        drop[number] = min(pools[number].idle, max(0, sum(have) - wanted))
        have[number] -= drop[number]
    return add, drop
