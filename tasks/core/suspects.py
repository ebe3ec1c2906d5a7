"""Which read of a batch breaks what calls it: found by halving, one failure at a time.

A batch that failed again and again is called range by range. The range that was being called when an attempt ended
without a word is cut in two for the next attempt, down to single reads; a read that fails alone, twice, is quarantined.
And when the reads of a file that can't be read are: so that one that is away for a while costs none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

#: Reads per range, at first: few enough that a failure costs little, enough that the engine is not left idle.
RANGE = 64
#: Failures of a read alone until it is quarantined: one may be the machine's.
STRIKES = 2
#: Quarantined reads of one batch above which it is not the reads that are at fault.
MOST = 16
#: Why a file can't be read that is there and has its end: another try reads the same. All other reasons may pass, and
#: of a file that was replaced, the next launch looks up where its reads lie now.
LASTING = frozenset(("corrupt",))


def is_given_up(reason: str, *, missing_accepted: bool, last_resort: bool, folder_is_there: bool) -> bool:
    """Tell whether the reads of a file that can't be read are quarantined, instead of tried once more.

    A file system that is away, or slow to show a new file, must not cost reads. So a file that is gone, or another by
    now, is given up only as the last resort, and where its folder shows other files.

    Args:
        reason: What is wrong with the file.
        missing_accepted: A person has said that files may be missing for good.
        last_resort: Its batch failed again and again.
        folder_is_there: The file's folder can be listed, and is not empty.
    """
    return reason in LASTING or missing_accepted or (last_resort and folder_is_there)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspects:
    """Where the search stands. Positions are those of reads in the batch, from 0."""

    #: First and last + 1 of each range, in order, without gaps.
    ranges: tuple[tuple[int, int], ...]
    #: Failures of reads alone, by position.
    strikes: tuple[tuple[int, int], ...] = ()
    quarantined: tuple[int, ...] = ()
    #: Why, in the same order.
    causes: tuple[str, ...] = ()
    #: First read of the range that is being called; None between ranges.
    calling: int | None = None
    #: What the engine raised over that range; the empty string when it died without a word, or is still at it.
    error: str = ""

    @classmethod
    def of(cls, reads: int) -> Suspects:
        """Begin the search in a batch."""
        return cls(ranges=tuple((at, min(at + RANGE, reads)) for at in range(0, reads, RANGE)))

    @property
    def hopeless(self) -> bool:
        """Whether so much is quarantined that the engine itself must be at fault."""
        return len(self.quarantined) > MOST

    def narrowed(self) -> Suspects:
        """Return what the next attempt begins with: where the last one failed, smaller ranges."""
        if self.calling is None:
            return self
        start, stop = next(one for one in self.ranges if one[0] == self.calling)
        between = replace(self, calling=None, error="")
        if stop - start > 1:
            middle = (start + stop) // 2
            halves = ((start, middle), (middle, stop))
            ranges = tuple(part for one in self.ranges for part in (halves if one == (start, stop) else (one,)))
            return replace(between, ranges=ranges)
        strikes = {**dict(self.strikes), start: dict(self.strikes).get(start, 0) + 1}
        between = replace(between, strikes=tuple(strikes.items()))
        if strikes[start] < STRIKES:
            return between
        cause = self.error or "the worker died or hung"
        return replace(between, quarantined=(*self.quarantined, start), causes=(*self.causes, cause))
