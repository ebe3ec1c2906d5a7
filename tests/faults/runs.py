"""Runs on a real Slurm for faults to happen to, two workers each, and what must have come of them."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from infra.workers import read_heartbeats
from tasks.core.liveness import Beat
from tasks.formats.commit import committed_ids
from tasks.formats.workspace import Workspace
from tests.commands import finished, while_running
from tests.slurm import jobs
from tests.test_flow import start
from tests.test_pipeline import check_from_outside, digests

#: Samples/s of a worker with which a run has work for one fault, however late another worker comes; and for four, or
#: until other runs have started beside it.
SLOW, SLOWEST = 15_000, 5_000

SLURM_SITE = """
name = "faults"
kind = "slurm"
interface = "lo"
umask = "0027"
late_after = 3
dead_after = 20
[split]
partition = "h100"
gres = "gpu:H100:1"
memory_per_thread_gb = 1
maximum = 2
minimum = 2
walltime = "30:00"
"""


def run(data: Path, out: Path, site: Path, rate: int = 60_000) -> subprocess.Popen[str]:
    """Start a run of 2 M samples at so many samples/s per worker."""
    return start(data, out, "--site", str(site), "--rate", str(rate))


def at_work(process: subprocess.Popen[str], out: Path, commits: int = 1) -> Beat:
    """Wait until something is committed and two workers are in the middle of more; return what one of them tells."""
    folder = Workspace(out).heartbeats

    def both() -> list[Beat]:
        living = [beat for beat in read_heartbeats(folder) if runs(beat.process)]
        return living if len({beat.worker for beat in living}) == 2 else []

    while_running(lambda: len(committed_ids(Workspace(out))) >= commits, process)
    return while_running(both, process)[0]


def runs(process: int) -> bool:
    """Tell whether a process is there, and not suspended."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    return False


def complete(process: subprocess.Popen[str], data: Path, out: Path, undisturbed: dict[str, str]) -> None:
    """The run must end, with every read once, with the very bytes of a run without faults, and with no job left."""
    assert finished(process)["reads"] == 80
    assert digests(out) == undisturbed
    check_from_outside(out, data)
    assert not jobs()


def nanny_of(beat: Beat) -> psutil.Process:
    parent = psutil.Process(beat.process).parent()
    assert parent is not None
    assert "dask_worker" in " ".join(parent.cmdline())
    return parent
