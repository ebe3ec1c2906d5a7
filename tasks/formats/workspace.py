"""Where a run keeps its state: the folder `.shoal` in the output folder."""

from __future__ import annotations

import errno
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.core.errors import InputError


@dataclass(frozen=True, slots=True)
class Workspace:
    """Paths of one run folder. Nothing here is opened or made but by the functions below."""

    out: Path

    @property
    def state(self) -> Path:
        return self.out / ".shoal"

    @property
    def plan(self) -> Path:
        return self.state / "plan"

    @property
    def staging(self) -> Path:
        """One folder per attempt, renamed into `committed` when it is whole."""
        return self.state / "staging"

    @property
    def committed(self) -> Path:
        """One folder per batch, named by its id."""
        return self.state / "committed"

    @property
    def sorted(self) -> Path:
        """One folder per batch, of what was sorted otherwise than it was called; only after `resplit` or `demux`."""
        return self.state / "sorted"

    @property
    def suspects(self) -> Path:
        """One file per batch that failed again and again: where the search for the read at fault stands."""
        return self.state / "suspects"

    @property
    def heartbeats(self) -> Path:
        return self.state / "heartbeats"

    @property
    def crew(self) -> Path:
        """What became of the last flow's workers: bundles that failed on them, workers set aside; see read_crew."""
        return self.state / "crew.json"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def settings(self) -> Path:
        return self.state / "settings.json"

    @property
    def sample_sheet(self) -> Path:
        """The sample sheet as it was when the run was begun; only where it has one."""
        return self.state / "sample_sheet.csv"

    @property
    def run_id(self) -> Path:
        """Holds the name of all the run's Slurm jobs, the same for every flow that works on it."""
        return self.state / "run_id"

    @property
    def lock(self) -> Path:
        return self.state / "lock"

    @property
    def merged(self) -> Path:
        """Written last by merge: what it made of which plan."""
        return self.state / "merged.json"

    @property
    def written(self) -> Path:
        """Names of the tree's files that are ours, written before they are made; see names_written."""
        return self.state / "written.json"

    @property
    def ledger(self) -> Path:
        return self.out / "ledger.parquet"

    @property
    def input_files(self) -> Path:
        return self.out / "input_files.parquet"

    @property
    def provenance(self) -> Path:
        return self.out / "provenance.json"

    def create(self) -> None:
        """Make the folders that workers write into."""
        for folder in (self.staging, self.committed, self.heartbeats, self.logs):
            folder.mkdir(parents=True, exist_ok=True)


def run_id_of(workspace: Workspace) -> str:
    """Return the run's id, made at its first call. Only for the one flow that owns the run folder."""
    try:
        return workspace.run_id.read_text("utf-8").strip()
    except FileNotFoundError:
        made = f"shoal-{uuid.uuid4().hex[:12]}"
        write_text(workspace.run_id, made + "\n")
        return made


def read_crew(workspace: Workspace) -> tuple[int, tuple[str, ...]]:
    """Return how many bundles failed on a worker in the last flow, and the workers that it set aside, in words."""
    told = read_json(workspace.crew) or {"failures": 0, "aside": []}
    return told["failures"], tuple(told["aside"])


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write JSON so that a reader, or a crash, sees the old file or the new one, never half of it.

    Args:
        durable: Whether it must survive a crash of the machine, at the price of waiting for the disk.
    """
    write_text(path, json.dumps(value, indent=1, default=str) + "\n", durable=durable)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace a file by a whole new one."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    with new.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    new.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file; None when it is not there.

    Raises:
        InputError: it was cut or garbled.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:  # NFS: another node replaced or removed it while we read
            return None
        raise
    except ValueError as error:
        message = f"is not whole ({error}); restore it, or call into another output folder"
        raise InputError(str(path), "damaged", message) from error


def fsync_path(path: Path) -> None:
    """Make a file's content, whoever wrote it, or the names in a folder survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
