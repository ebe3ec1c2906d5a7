"""Watch: one look at the folders that sequencers write into, and what is to be called now.

A look is one walk. Folders whose time stamp has not changed, and in which nothing is awaited, are not listed again;
files are not opened again until their size or time changes. What can't be read is listed and keeps nothing else from
being called.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

from tasks.core.errors import InputError, SettingsError
from tasks.core.watching import (
    GROWING,
    NOTHING_CALLED,
    PASSING,
    ArrivedFile,
    ArrivedRun,
    Called,
    Decision,
    decide,
    idempotency_key,
    next_step,
    out_folder,
    run_folder,
)
from tasks.formats.arrivals import Arrivals, SeenFolder
from tasks.formats.planfile import has_plan, read_plan
from tasks.formats.pod5 import Pod5Index, is_lost_folder, scan_pod5
from tasks.formats.workspace import Workspace, write_json, write_text
from tasks.merge import merged_before
from tasks.settings import RunSettings
from tasks.watch_settings import WatchSettings

logger = logging.getLogger(__name__)

#: Where a watch keeps its index and lock, in its output folder.
STATE = ".shoal-watch"
#: Seconds by which a folder's listing must be younger than its time stamp to be trusted: time stamps are coarse.
COARSE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call that is to be started."""

    #: The same input has the same key; another attempt at it, another.
    key: str
    settings: RunSettings
    #: What failures are counted under, and how many there were.
    counted_as: str
    failures: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSeen:
    """A run, and what is to be done about it."""

    folder: str
    out: str
    #: `wait`, `call`, `close`, `closed` (at an earlier look) or `refused`.
    action: str
    why: str
    files: int
    growing: int = 0
    unusable: tuple[ArrivedFile, ...] = ()
    reads: int = 0
    call: Call | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a look saw."""

    runs: tuple[RunSeen, ...]
    #: (path, what is the matter with it), of files, folders and runs.
    problems: tuple[tuple[str, str], ...]
    #: Folders listed and files opened: what the look cost.
    listed: int
    opened: int

    @property
    def calls(self) -> tuple[RunSeen, ...]:
        return tuple(run for run in self.runs if run.call)


def look(settings: WatchSettings, *, now: float) -> Look:
    """Look once. One at a time: the caller holds the lock of the output folder.

    Args:
        now: Seconds since the epoch.
    """
    with closing(Arrivals(settings.out / STATE / "arrivals.sqlite")) as arrivals:
        walk = _Walk(arrivals, settings, now)
        for root in settings.folders:
            walk.walk(root)
        outs: dict[str, list[str]] = defaultdict(list)
        for folder, run in walk.runs.items():
            outs[str(out_folder(PurePath(folder), PurePath(run.root), settings.out))].append(folder)
        runs = []
        for out, folders in outs.items():
            for folder in folders:
                seen = _judge(arrivals, settings, folder, walk.runs[folder], Path(out), now)
                if seen is None:
                    continue
                if len(folders) > 1:
                    others = ", ".join(other for other in folders if other != folder)
                    why = f"{out} would be the output of {others} too; watch them into different folders"
                    seen = replace(seen, action="refused", why=why, call=None)
                for file in seen.unusable:
                    walk.problems[file.path] = file.message
                if seen.action == "refused":
                    walk.problems[folder] = seen.why
                runs.append(seen)
        told = [{"folder": run.folder, "out": run.out, "action": run.action, "why": run.why} for run in runs]
        write_json(settings.out / STATE / "look.json", {"time": now, "problems": len(walk.problems), "runs": told})
        return Look(
            runs=tuple(sorted(runs, key=lambda run: run.folder)),
            problems=tuple(sorted(walk.problems.items())),
            listed=walk.listed,
            opened=walk.opened,
        )


def note_failure(settings: WatchSettings, call: Call) -> None:
    """Count an attempt that failed; the next look makes another, until there were enough."""
    with closing(Arrivals(settings.out / STATE / "arrivals.sqlite")) as arrivals:
        arrivals.put_failures(call.counted_as, call.failures + 1)


def covered(settings: RunSettings) -> bool:
    """Tell whether the result of a call holds all files of its input."""
    (listing,) = settings.input
    sizes = _called(Workspace(settings.out)).sizes
    return all(line in sizes for line in listing.read_text("utf-8").splitlines())


@dataclass(slots=True, kw_only=True)
class _RunFolders:
    """Folders that belong to one run."""

    root: str
    folders: list[str] = field(default_factory=list)
    ended: bool = False
    changed: bool = False


class _Walk:
    """One walk over the roots."""

    def __init__(self, arrivals: Arrivals, settings: WatchSettings, now: float) -> None:
        self._arrivals = arrivals
        self._settings = settings
        self._now = now
        self._met: set[tuple[int, int]] = set()
        self.runs: dict[str, _RunFolders] = {}
        self.problems: dict[str, str] = {}
        self.listed = 0
        self.opened = 0

    def walk(self, root: Path) -> None:
        waiting = [str(root)]
        while waiting:
            path = waiting.pop()
            try:
                status = os.stat(path)  # noqa: PTH116
                if (status.st_dev, status.st_ino) in self._met:  # a link that leads back up, or a root within a root
                    continue
                self._met.add((status.st_dev, status.st_ino))
                known = self._arrivals.folder(path)
                fresh = known is None or not (
                    known.quiet
                    and known.mtime_ns == status.st_mtime_ns
                    and known.listed - known.mtime_ns / 1e9 >= COARSE
                )
                folder, changed = (known, False) if known and not fresh else self._list(path, status.st_mtime_ns, known)
            except OSError as error:
                self.problems[path] = f"can't be listed: {error.strerror}"
                continue
            run = self.runs.setdefault(
                str(run_folder(PurePath(path, "any.pod5"), PurePath(root))), _RunFolders(root=str(root))
            )
            run.folders.append(path)
            run.ended |= folder.ended
            run.changed |= changed
            waiting.extend(reversed(folder.subfolders))

    def _list(self, path: str, mtime_ns: int, known: SeenFolder | None) -> tuple[SeenFolder, bool]:
        """List a folder, and open what has settled and was not opened yet; also tell whether anything is new."""
        self.listed += 1
        before = self._arrivals.files(path)
        files: dict[str, ArrivedFile] = {}
        subfolders = []
        problems: dict[str, str] = {}
        ended = False
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(".") or Path(entry.path) == self._settings.out:
                    continue
                if not _speakable(entry.path):
                    problems[ascii(entry.path)] = "its name is not UTF-8, or has a line break; rename it"
                elif is_lost_folder(Path(entry.path)):
                    problems[entry.path] = f"links to {Path(entry.path).readlink()}, which is not there"
                elif entry.is_dir():
                    subfolders.append(entry.path)
                elif entry.name.endswith(".pod5"):
                    files[entry.path] = self._file(entry, before.get(entry.path))
                elif entry.name.startswith("final_summary") and entry.name.endswith(".txt"):
                    ended = True
        changed = [file for file in files.values() if before.get(file.path) != file]
        self._arrivals.put_files(path, changed)
        self._arrivals.forget_files(before.keys() - files)
        self.problems |= problems
        awaited = any(file.state == "growing" or file.reason in PASSING | GROWING for file in files.values())
        seen = SeenFolder(
            path=path,
            mtime_ns=mtime_ns,
            listed=self._now,
            subfolders=tuple(subfolders),
            ended=ended,
            quiet=not awaited and not problems,
        )
        self._arrivals.put_folder(seen)
        return seen, bool(changed) or known is None or replace(known, listed=seen.listed) != seen

    def _file(self, entry: os.DirEntry[str], seen: ArrivedFile | None) -> ArrivedFile:
        try:
            status = entry.stat()
            size, mtime_ns = status.st_size, status.st_mtime_ns
        except OSError:  # scan_pod5 finds the words for it
            size, mtime_ns = 0, 0
        step = next_step(size, mtime_ns, seen, now=self._now, settled_for=self._settings.settled_for)
        if step == "keep" and seen is not None:
            return seen
        same = seen is not None and (seen.size, seen.mtime_ns) == (size, mtime_ns)
        file = ArrivedFile(
            path=entry.path,
            size=size,
            mtime_ns=mtime_ns,
            since=seen.since if seen is not None and same else self._now,
            state="growing",
        )
        if step == "wait":
            return file
        self.opened += 1
        try:
            index = scan_pod5(Path(entry.path))
        except InputError as error:
            logger.warning("left out %s", error)
            return replace(file, state="unusable", reason=error.reason, message=error.message)
        return replace(
            file,
            state="finished",
            reads=len(index.read_ids),
            samples=int(index.num_samples.sum()),
            facts=tuple(_facts(index)),
        )


def _speakable(path: str) -> bool:
    """Tell whether a path can stand in tables and lists."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return len(path.splitlines()) == 1


def _facts(index: Pod5Index) -> Iterator[tuple[str, str]]:
    run = index.runs[int(index.run_of_read[0])]
    yield "flow_cell", run.flow_cell_id
    yield "flow_cell_product", run.flow_cell_product_code
    yield "kit", run.sequencing_kit
    yield "sample", run.sample_id
    yield "experiment", run.experiment_name


def _judge(
    arrivals: Arrivals, settings: WatchSettings, folder: str, found: _RunFolders, out: Path, now: float
) -> RunSeen | None:
    """Say what to do about one run; None where there is none."""
    closed = arrivals.closed(folder, rules=settings.stop_rules)
    if closed and not found.changed:
        return RunSeen(folder=folder, out=str(out), action="closed", why=closed[1], files=closed[0])
    files = [file for path in found.folders for file in arrivals.files(path).values()]
    if not files:
        return None
    run = ArrivedRun(folder=folder, files=tuple(files), ended=found.ended)
    decision = decide(
        run,
        _called(Workspace(out)),
        stop=settings.stop_rules,
        live=settings.live,
        idle_after=settings.idle_after,
        now=now,
    )
    if decision.action == "close":
        arrivals.close_run(folder, rules=settings.stop_rules, files=len(files), why=decision.why)
    elif closed:
        arrivals.reopen_run(folder)
    seen = RunSeen(
        folder=folder,
        out=str(out),
        action=decision.action,
        why=decision.why,
        files=len(files),
        growing=len(run.of("growing")),
        unusable=run.of("unusable"),
        reads=sum(file.reads for file in files),
    )
    if decision.action != "call":
        return seen
    try:
        return _with_call(arrivals, settings, run, decision, seen)
    except SettingsError as error:
        return replace(seen, action="refused", why=str(error))


def _with_call(
    arrivals: Arrivals, settings: WatchSettings, run: ArrivedRun, decision: Decision, seen: RunSeen
) -> RunSeen:
    run_settings = settings.for_run(run.facts, input=(Path(run.folder),), out=Path(seen.out))
    first_key = idempotency_key(seen.out, decision.files, run_settings.digest())
    failures = arrivals.failures(first_key)
    if failures >= settings.attempts:
        raise SettingsError(
            f"given up after {failures} attempts ({decision.why}); see the logs of the last one, then call it by hand: "
            f"shoal run {run.folder} --out {seen.out}"
        )
    listing = Workspace(Path(seen.out)).state / "inputs" / f"{first_key}.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    write_text(listing, "".join(f"{path}\n" for path in sorted(file.path for file in decision.files)))
    return replace(
        seen,
        call=Call(
            key=idempotency_key(seen.out, decision.files, run_settings.digest(), attempt=failures),
            settings=run_settings.model_copy(update={"input": (listing,)}),
            counted_as=first_key,
            failures=failures,
        ),
    )


def _called(workspace: Workspace) -> Called:
    """Read off a run folder what it is a result of; nothing, while it isn't whole."""
    if not has_plan(workspace):
        return NOTHING_CALLED
    merged = merged_before(workspace)
    if merged is None:
        return NOTHING_CALLED
    files = read_plan(workspace).files
    return Called(
        sizes={file.path: file.size for file in files},
        unread=frozenset(file.path for file in files if not file.reads),
        bases=merged.bases,
    )
