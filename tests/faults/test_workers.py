"""Whatever happens to workers, their nannies, jobs and nodes: the ledger is complete, the bytes are the same.

The real command, a real Slurm, a real Prefect server. One run sees four faults.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tasks.core.liveness import Beat
from tests.faults.runs import SLOWEST, at_work, complete, nanny_of, run
from tests.slurm import slurm, wait_for
from tests.test_flow import modes

pytestmark = pytest.mark.slurm


def job_of(beat: Beat) -> str:
    return str(psutil.Process(beat.process).environ()["SLURM_JOB_ID"])


def kill_worker(beat: Beat) -> None:
    os.kill(beat.process, signal.SIGKILL)


def kill_nanny(beat: Beat) -> None:
    nanny_of(beat).kill()


def cancel_job(beat: Beat) -> None:
    slurm("scancel", job_of(beat))


def stop_worker(beat: Beat) -> None:
    os.kill(beat.process, signal.SIGSTOP)


def stop_worker_and_nanny(beat: Beat) -> None:
    os.kill(nanny_of(beat).pid, signal.SIGSTOP)
    os.kill(beat.process, signal.SIGSTOP)


def node_down(beat: Beat) -> None:
    slurm("scontrol", "update", f"nodename={node_of(beat)}", "state=down", "reason=test")


def node_drained(beat: Beat) -> None:
    slurm("scontrol", "update", f"nodename={node_of(beat)}", "state=drain", "reason=test")


def walltime_reached(beat: Beat) -> None:
    slurm("scontrol", "update", f"jobid={job_of(beat)}", "timelimit=1")


def node_of(beat: Beat) -> str:
    return slurm("squeue", "--noheader", "--jobs", job_of(beat), "--format", "%N")


@pytest.fixture
def _nodes_up() -> Iterator[None]:
    """Nodes that a test takes down come back after it."""
    yield
    for node in ("n1", "n2"):
        with suppress(AssertionError):  # it was not down
            slurm("scontrol", "update", f"nodename={node}", "state=resume")
    wait_for(lambda: "down" not in slurm("sinfo", "-h", "-N", "-o", "%T"), 120)


@pytest.mark.parametrize(
    "faults",
    [
        (kill_worker, cancel_job, stop_worker, node_drained),
        (kill_nanny, stop_worker_and_nanny, node_down, walltime_reached),
    ],
)
def test_one_fault_of_a_worker_after_another(
    faults: tuple[Callable[[Beat], None], ...],
    data: Path,
    site: Path,
    tmp_path: Path,
    undisturbed: dict[str, str],
    _nodes_up: None,  # noqa: PT019
) -> None:
    process = run(data, tmp_path / "out", site, rate=SLOWEST)
    for number, fault in enumerate(faults, start=1):
        beat = at_work(process, tmp_path / "out", commits=number)
        fault(beat)
        if fault is not node_drained:
            patience = 300 if fault is walltime_reached else 180  # Slurm counts it in minutes
            wait_for(lambda beat=beat: not psutil.pid_exists(beat.process), patience)
    complete(process, data, tmp_path / "out", undisturbed)
    assert modes(*(tmp_path / "out").glob("[!.]*")) == {0o640, 0o750}, "the jobs have not the site's umask"
