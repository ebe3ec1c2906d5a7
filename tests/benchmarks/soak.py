"""Something dies every few seconds until a run is done: is every read there, once, with the right bytes?

    python -m tests.benchmarks.soak [--seed 1] [--reads 4000] [--every 6]

A run of `--reads` reads by the null engine on a real Slurm (infra/slurm-testbed) with two workers. At random moments a
random worker, its nanny, its job, its node or the flow itself is killed, suspended, cancelled or taken down; a flow
that ended is started again with the same command. Prints each fault and, at the end, what came out. The same seed gives
the same faults in the same order; when each one strikes is up to the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from infra.prefect_server import prefect_api
from infra.workers import read_heartbeats
from tasks.core.liveness import Beat
from tasks.formats.commit import committed_ids
from tasks.formats.workspace import Workspace
from tests.faults.runs import SLURM_SITE, runs
from tests.faults.test_workers import (
    cancel_job,
    kill_nanny,
    kill_worker,
    node_down,
    node_drained,
    stop_worker,
    stop_worker_and_nanny,
)
from tests.making import write_pod5
from tests.slurm import jobs, slurm, testbed
from tests.test_flow import start
from tests.test_pipeline import check_from_outside, digests

#: Samples of a read, reads of a file, and samples per second of a worker.
READ, FILE, RATE = 25_000, 200, 300_000
OF_WORKERS: tuple[Callable[[Beat], None], ...] = (
    kill_worker,
    kill_nanny,
    cancel_job,
    stop_worker,
    stop_worker_and_nanny,
    node_down,
    node_drained,
)
OF_FLOW = (signal.SIGKILL, signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run until every read has its fate, and compare with a run that nothing disturbed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reads", type=int, default=4000)
    parser.add_argument("--every", type=float, default=6.0, help="seconds between faults, on average")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch, testbed() as configuration:
        work = Path(scratch)
        os.environ["SLURM_CONF"] = str(configuration)
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])  # jobs import what we import
        site = work / "site.toml"
        site.write_text(SLURM_SITE)
        for number in range(given.reads // FILE):
            write_pod5(work / "in" / f"{number}.pod5", [READ] * FILE, first=number * FILE)
        with prefect_api(log_folder=work, announce=print):
            undisturbed = start(work / "in", work / "undisturbed", "--rate", "1e9")
            output, errors = undisturbed.communicate()
            assert undisturbed.returncode == 0, errors
            soak(work, site, given.seed, given.every)
        assert digests(work / "out") == digests(work / "undisturbed"), "the bytes differ"
        said = check_from_outside(work / "out", work / "in").strip().splitlines()
        print(f"the same bytes as undisturbed; {json.loads(output)['reads']} reads; checked from outside: {said[-1]}")
        print(f"Slurm jobs left: {len(jobs())}")


def soak(work: Path, site: Path, seed: int, every: float) -> None:
    """Start the run, and break something again and again, until it is done."""
    chance, struck, began, flows = random.Random(seed), Counter[str](), time.monotonic(), 0
    flow: subprocess.Popen[str] | None = None
    while flow is None or flow.poll() != 0:
        if flow is None or flow.poll() is not None:
            if flow is not None:
                flow.communicate()
            flow = start(work / "in", work / "out", "--site", str(site), "--rate", str(RATE))
            flows += 1
        deadline = time.monotonic() + chance.uniform(0.5, 1.5) * every
        while time.monotonic() < deadline and flow.poll() is None:
            time.sleep(0.1)
        if flow.poll() is None:
            what = strike(flow, Workspace(work / "out"), chance)
            struck.update([what] if what else [])
            done = len(committed_ids(Workspace(work / "out"))) if (work / "out").exists() else 0
            print(
                f"{time.monotonic() - began:6.1f} s  {done:4d} batches committed  {what or 'nobody to strike'}",
                flush=True,
            )
    flow.communicate()
    print(f"{sum(struck.values())} faults, {flows} flows, {time.monotonic() - began:.0f} s: {dict(struck)}")


def strike(flow: subprocess.Popen[str], workspace: Workspace, chance: random.Random) -> str:
    """Break something; return what, the empty string when nothing was there to break."""
    if chance.random() < 0.15:
        number = chance.choice(OF_FLOW)
        flow.send_signal(number)
        flow.wait(60)
        return f"flow: {number.name}"
    fault = chance.choice(OF_WORKERS)
    for node in ("n1", "n2"):  # whatever the last fault did to them
        with suppress(AssertionError):
            slurm("scontrol", "update", f"nodename={node}", "state=resume")
    living = [beat for beat in read_heartbeats(workspace.heartbeats) if runs(beat.process)]
    if not living:
        return ""
    try:
        fault(chance.choice(living))
    except (psutil.NoSuchProcess, ProcessLookupError, AssertionError):
        return ""  # it ended just now
    return fault.__name__


if __name__ == "__main__":
    main()
