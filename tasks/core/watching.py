"""Watching, as decisions: what has arrived, what belongs together, what to call, and when a run is over.

Everything here is a function of what a look at the folders saw, of what is called already, and of the time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import PurePath
from typing import Literal

from tasks.core.errors import SettingsError

#: MinKNOW's folders of POD5 files within a run's folder.
POD5_FOLDERS = frozenset(("pod5", "pod5_pass", "pod5_fail", "pod5_skip"))
#: Reasons that may pass without the file's size or time changing, e.g. after a chmod.
PASSING = frozenset(("unreadable", "missing", "dangling_link"))
#: Reasons that pass when the file grows, which its folder's time stamp does not tell: a copy that stalls, then goes on.
GROWING = frozenset(("unfinished", "empty"))
#: What a rule can match.
MATCHED = ("flow_cell", "flow_cell_product", "kit", "sample", "experiment", "folder")

State = Literal["growing", "finished", "unusable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivedFile:
    """A POD5 file as the looks so far saw it."""

    path: str
    #: Bytes.
    size: int
    #: Nanoseconds since the epoch, by the clock of the file system.
    mtime_ns: int
    #: Seconds since the epoch, by our clock: when a look first saw this size and mtime.
    since: float
    state: State
    #: Why it is unusable: the ledger's word for it, and words for people.
    reason: str = ""
    message: str = ""
    reads: int = 0
    samples: int = 0
    #: The run's properties by which rules match, as (name, value).
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivedRun:
    """The files of one run folder."""

    folder: str
    files: tuple[ArrivedFile, ...]
    #: MinKNOW has written its final_summary.
    ended: bool

    def of(self, state: State) -> tuple[ArrivedFile, ...]:
        return tuple(file for file in self.files if file.state == state)

    @property
    def facts(self) -> dict[str, str]:
        """What rules match: of the file that came first."""
        finished = self.of("finished")
        first = min(finished, key=lambda file: (file.mtime_ns, file.path), default=None)
        return {**(dict(first.facts) if first else {}), "folder": self.folder}


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """What the run's output holds already."""

    #: Size of each input file that the result is made of.
    sizes: Mapping[str, int]
    #: Those of them that held no read that could be taken when the result was made.
    unread: frozenset[str] = frozenset()
    bases: int = 0


NOTHING_CALLED = Called(sizes={})


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRules:
    """When enough is enough; None: never."""

    reads: int | None = None
    bases: int | None = None
    #: Seconds from the first file's arrival.
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do about a run now."""

    action: Literal["wait", "call", "close"]
    why: str
    #: With `call`: all of the run's input so far, with what is called already.
    files: tuple[ArrivedFile, ...] = ()
    #: Nothing more is awaited.
    closed: bool = False


def next_step(
    size: int, mtime_ns: int, seen: ArrivedFile | None, *, now: float, settled_for: float
) -> Literal["keep", "wait", "open"]:
    """Say what to do about a file that a look lists: keep what is known, wait, or open it (once).

    A file has settled when its mtime is `settled_for` old, or when looks that far apart saw the same size and mtime: a
    file server's clock may be wrong. Whether it is whole only its footer tells, when it is opened.
    """
    same = seen is not None and (seen.size, seen.mtime_ns) == (size, mtime_ns)
    if seen is not None and same:
        if seen.state == "finished" or (seen.state == "unusable" and seen.reason not in PASSING):
            return "keep"
        if now - seen.since >= settled_for:
            return "open"
    return "open" if now - mtime_ns / 1e9 >= settled_for else "wait"


def run_folder(file: PurePath, root: PurePath) -> PurePath:
    """Say which folder's run a file belongs to: the one above MinKNOW's POD5 folders, or else the one it lies in."""
    folder = file.parent
    for here in (folder, *folder.parents):
        if here == root:
            break
        if here.name in POD5_FOLDERS:
            return here.parent
    return folder


def out_folder(run: PurePath, root: PurePath, out: PurePath) -> PurePath:
    """Say where a run's output goes: the same tree below `out` as below `root`; the root itself by its name."""
    return out / (run.relative_to(root) if run != root else run.name)


def decide(run: ArrivedRun, called: Called, *, stop: StopRules, live: bool, idle_after: float, now: float) -> Decision:
    """Say what to do about a run: call what is new (live), or all of it once it is closed; or wait.

    What can't be used goes along with the last call: its place is in the ledger.
    """
    finished, stopped = within(run.of("finished"), called, stop, now=now)
    growing = run.of("growing")
    last_change = max((file.since for file in run.files), default=now)
    if stopped:
        over = stopped
    elif run.ended and not growing:
        over = "the sequencer has finished it"
    elif now - last_change >= idle_after and not growing:
        over = f"nothing new for {format_duration(idle_after)}"
    else:
        over = ""
    if not finished:
        why = "no finished file that could be called"
        return Decision(action="close" if over else "wait", why=f"{over}: {why}" if over else why, closed=bool(over))
    wanted = finished + (run.of("unusable") if over else ())
    new = [
        file
        for file in wanted
        if called.sizes.get(file.path) != file.size
        # Copies that reserve their space first become whole at the same size.
        or (file.state == "finished" and file.path in called.unread)
    ]
    if new and (live or over):
        return Decision(action="call", why=over or f"{len(new)} new files", files=wanted, closed=bool(over))
    if over:
        return Decision(action="close", why=over, files=wanted, closed=True)
    return Decision(action="wait", why="nothing new" if live else "not finished yet", files=wanted)


def within(
    finished: Sequence[ArrivedFile], called: Called, stop: StopRules, *, now: float
) -> tuple[tuple[ArrivedFile, ...], str]:
    """Return the files that stop rules let be called, in order of arrival, and which rule has stopped the run.

    The answer depends on no earlier one: the same files are left out whenever it is asked.
    """
    files = sorted(finished, key=lambda file: (file.mtime_ns, file.path))
    if stop.bases is not None and called.bases >= stop.bases:
        return tuple(file for file in files if file.path in called.sizes), f"{stop.bases:,} bases are called"
    stopped = ""
    if stop.seconds is not None and files:
        end = files[0].mtime_ns / 1e9 + stop.seconds
        files = [file for file in files if file.mtime_ns / 1e9 <= end]
        if now >= end:
            stopped = f"{format_duration(stop.seconds)} have passed since its first file"
    if stop.reads is not None:
        reads = 0
        for place, file in enumerate(files):
            reads += file.reads
            if reads >= stop.reads:
                return tuple(files[: place + 1]), f"{stop.reads:,} reads are there"
    return tuple(files), stopped


def idempotency_key(out: str, files: Sequence[ArrivedFile], settings_digest: str, *, attempt: int = 0) -> str:
    """Name a call by its input: the same files into the same folder by the same settings have one key, on any host."""
    digest = blake2b(digest_size=10)
    for part in (out, settings_digest, *sorted(f"{file.path}\0{file.size}" for file in files)):
        digest.update(part.encode("utf-8", "surrogateescape") + b"\n")
    return f"basecall-{digest.hexdigest()}" + (f"-{attempt}" if attempt else "")


def matches(patterns: Mapping[str, str], facts: Mapping[str, str]) -> bool:
    """Tell whether a run's facts match all patterns (`FAX*`, case ignored)."""
    return all(fnmatchcase(facts.get(name, "").lower(), pattern.lower()) for name, pattern in patterns.items())


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str, *, zero: bool = False) -> float:
    """Read `90`, `90s`, `5m`, `1.5h`, `2d` as seconds; 0 only where that may be."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if not found or not (zero or float(found[1])):
        raise SettingsError(f"{text!r} is no length of time; give for example 30s, 5m, 2h or 1d")
    return float(found[1]) * _UNITS[found[2] or "s"]


def format_duration(seconds: float) -> str:
    """Write seconds as people say them: `5 min`, `2 h`."""
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.4g} {name}"
    return f"{seconds:.4g} s"
