"""How fast a run goes, in words and as a table of its workers; for Prefect's UI and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from tasks.core.liveness import Beat
from tasks.core.statistics import short
from tasks.progress import RunProgress

#: Seconds without a beat after which people should look.
LATE = 30.0


def progress_words(progress: RunProgress, *, since: RunProgress, seconds: float) -> str:
    """Say how far a run is, how fast it goes and when it will be done.

    Args:
        since: The progress when this flow began: what an earlier one called says nothing about our rate.
        seconds: Time since then.
    """
    words = f"{progress.reads_done:,} of {progress.reads:,} reads, {progress.bases:,} bases"
    samples = progress.samples_done - since.samples_done
    if samples <= 0 or seconds <= 0:
        return words
    rate = samples / seconds
    left = timedelta(seconds=round((progress.samples - progress.samples_done) / rate))
    reads = (progress.reads_done - since.reads_done) / seconds
    pace = f"{short(reads)} reads/s, {short(rate)} samples/s, engines {100 * progress.busy:.0f} % busy"
    return f"{words}; {pace}; {left} to go"


class Pace:
    """The table of workers; rates are between one table and the next."""

    def __init__(self) -> None:
        self._before: dict[tuple[str, int, str, str], Beat] = {}

    def rows(self, beats: Sequence[Beat], *, now: float) -> list[dict[str, str | int]]:
        """Return a row for each slot at work, the slowest first.

        Args:
            now: Seconds since the epoch.
        """
        made = []
        for beat in beats:
            before = self._before.get(_slot(beat))
            passed = beat.time - before.time if before else 0.0
            rate = (beat.samples - before.samples) / passed if before and passed > 0 else 0.0
            silent = max(now - beat.time, 0.0)
            row: dict[str, str | int] = {
                "host": beat.host or beat.worker,
                "process": beat.process,
                "state": "late" if silent > LATE else "calling",
                "batch": beat.batch_id,
                "reads": beat.reads,
                "samples": beat.samples,
                "samples/s": short(rate) if rate > 0 else "",
                "last heartbeat": f"{silent:.0f} s ago",
            }
            made.append((rate, row))
        self._before = {_slot(beat): beat for beat in beats}
        return [row for _, row in sorted(made, key=lambda pair: pair[0])]


def _slot(beat: Beat) -> tuple[str, int, str, str]:
    return beat.worker, beat.process, beat.attempt, beat.batch_id
