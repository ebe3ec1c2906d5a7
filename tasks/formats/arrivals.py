"""What looks have seen, in a small database beside the output: no file is opened twice for being looked at.

Nothing depends on it but time: when it is missing or damaged it begins anew, and the next look fills it again.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tasks.core.watching import ArrivedFile, StopRules

logger = logging.getLogger(__name__)

TABLES = """
CREATE TABLE IF NOT EXISTS files (
  folder TEXT, path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, since REAL, state TEXT, reason TEXT, message TEXT,
  reads INTEGER, samples INTEGER, facts TEXT) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS files_by_folder ON files (folder);
CREATE TABLE IF NOT EXISTS folders (
  path TEXT PRIMARY KEY, mtime_ns INTEGER, listed REAL, subfolders TEXT, ended INTEGER, quiet INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS closed_by (folder TEXT PRIMARY KEY, rules TEXT, files INTEGER, why TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (key TEXT PRIMARY KEY, count INTEGER) WITHOUT ROWID;
"""
COLUMNS = "path, size, mtime_ns, since, state, reason, message, reads, samples, facts"


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenFolder:
    """A folder as it was last listed."""

    path: str
    mtime_ns: int
    #: Seconds since the epoch.
    listed: float
    subfolders: tuple[str, ...]
    #: It holds a final_summary of MinKNOW's.
    ended: bool
    #: Nothing in it is awaited, or to be told of: while its mtime stays, listing it again shows nothing new.
    quiet: bool


class Arrivals:
    """The index, open. One watch at a time: who opens it holds the watch's lock."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = _opened(file)
        except sqlite3.DatabaseError as error:
            logger.warning("%s is damaged (%s); it is made anew", file, error)
            file.unlink()
            self._database = _opened(file)

    def close(self) -> None:
        self._database.commit()
        self._database.close()

    def files(self, folder: str) -> dict[str, ArrivedFile]:
        """Return the files seen in one folder, by path."""
        rows = self._database.execute(f"SELECT {COLUMNS} FROM files WHERE folder = ?", (folder,))
        return {
            row[0]: ArrivedFile(
                path=row[0],
                size=row[1],
                mtime_ns=row[2],
                since=row[3],
                state=row[4],
                reason=row[5],
                message=row[6],
                reads=row[7],
                samples=row[8],
                facts=tuple((name, value) for name, value in json.loads(row[9])),
            )
            for row in rows
        }

    def put_files(self, folder: str, files: Iterable[ArrivedFile]) -> None:
        """Remember files, new or changed."""
        self._database.executemany(
            f"REPLACE INTO files (folder, {COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    folder,
                    file.path,
                    file.size,
                    file.mtime_ns,
                    file.since,
                    file.state,
                    file.reason,
                    file.message,
                    file.reads,
                    file.samples,
                    json.dumps(file.facts),
                )
                for file in files
            ],
        )

    def forget_files(self, paths: Iterable[str]) -> None:
        """Forget files that are gone."""
        self._database.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in paths])

    def folder(self, path: str) -> SeenFolder | None:
        row = self._database.execute(
            "SELECT mtime_ns, listed, subfolders, ended, quiet FROM folders WHERE path = ?", (path,)
        ).fetchone()
        if row is None:
            return None
        return SeenFolder(
            path=path,
            mtime_ns=row[0],
            listed=row[1],
            subfolders=tuple(json.loads(row[2])),
            ended=bool(row[3]),
            quiet=bool(row[4]),
        )

    def put_folder(self, folder: SeenFolder) -> None:
        self._database.execute(
            "REPLACE INTO folders VALUES (?, ?, ?, ?, ?, ?)",
            (folder.path, folder.mtime_ns, folder.listed, json.dumps(folder.subfolders), folder.ended, folder.quiet),
        )

    def closed(self, folder: str, *, rules: StopRules) -> tuple[int, str] | None:
        """Return the count of files and the reason with which a run was closed; None for one that is open.

        One that was closed by other rules is: they may have been raised.
        """
        row = self._database.execute(
            "SELECT files, why FROM closed_by WHERE folder = ? AND rules = ?", (folder, repr(rules))
        ).fetchone()
        return (int(row[0]), str(row[1])) if row else None

    def close_run(self, folder: str, *, rules: StopRules, files: int, why: str) -> None:
        self._database.execute("REPLACE INTO closed_by VALUES (?, ?, ?, ?)", (folder, repr(rules), files, why))

    def reopen_run(self, folder: str) -> None:
        self._database.execute("DELETE FROM closed_by WHERE folder = ?", (folder,))

    def failures(self, key: str) -> int:
        """Return how often the call of this key has failed."""
        row = self._database.execute("SELECT count FROM failures WHERE key = ?", (key,)).fetchone()
        return int(row[0]) if row else 0

    def put_failures(self, key: str, count: int) -> None:
        self._database.execute("REPLACE INTO failures VALUES (?, ?)", (key, count))


def _opened(file: Path) -> sqlite3.Connection:
    database = sqlite3.connect(file)
    try:
        database.execute("PRAGMA journal_mode = TRUNCATE")  # no shared memory: the folder may be on a file server
        database.executescript(TABLES)
        database.execute("SELECT count(*) FROM folders").fetchone()
    except sqlite3.DatabaseError:
        database.close()
        raise
    return database
