"""Commit: an attempt's staging folder becomes the batch's one result, by rename.

Delivery is at least once: Dask reruns what a dead worker held, and a worker that was thought dead may wake up. Rename
makes it exactly once: renaming onto a folder that is not empty fails, so the first attempt wins and the others learn
it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tasks.core.errors import SupersededError
from tasks.formats.workspace import Workspace, fsync_path, read_json, write_json

#: Name of the file in a committed batch's folder that tells what is in it.
MANIFEST = "batch.json"
#: Name of its table of fates, one row per read in the batch's order.
FATES = "fates.parquet"


@contextmanager
def staging(workspace: Workspace, batch_id: str, attempt: str) -> Iterator[Path]:
    """Give an attempt its own folder, and remove what is left of it at the end."""
    folder = workspace.staging / f"{batch_id}.{attempt}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def commit(workspace: Workspace, batch_id: str, folder: Path, manifest: dict[str, Any]) -> Path:
    """Make a staging folder the batch's result: everything on disk first, then one rename.

    Raises:
        SupersededError: another attempt was first; its result stands.
    """
    write_json(folder / MANIFEST, manifest)
    for file in folder.iterdir():
        fsync_path(file)
    fsync_path(folder)
    final = workspace.committed / batch_id
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise SupersededError(batch_id) from error
        raise
    fsync_path(workspace.committed)
    return final


def committed_ids(workspace: Workspace) -> set[str]:
    """List the batches that are committed."""
    try:
        with os.scandir(workspace.committed) as entries:
            return {entry.name for entry in entries}
    except FileNotFoundError:
        return set()


def read_manifest(workspace: Workspace, batch_id: str) -> dict[str, Any]:
    """Return what a committed batch's manifest tells."""
    manifest = read_json(workspace.committed / batch_id / MANIFEST)
    if not isinstance(manifest, dict):
        raise FileNotFoundError(workspace.committed / batch_id / MANIFEST)
    return manifest


def clear_staging(workspace: Workspace) -> None:
    """Remove what killed attempts left behind. Only for the one flow that owns the run folder, while none is its own.

    A worker of an earlier, dead flow may live on for a while, as a Slurm job that is being cancelled. Its folder gets a
    name that it does not know before anything in it goes: so it commits the whole of it before that, or nothing after.
    """
    for folder in workspace.staging.iterdir():
        gone = folder.with_name(f"removed.{folder.name.removeprefix('removed.')}")
        with suppress(OSError):  # it was committed, or removed by its worker, just now
            folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
