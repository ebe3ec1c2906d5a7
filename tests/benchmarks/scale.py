"""What a batch costs when there are many, and how busy engines of a set rate are.

    python -m tests.benchmarks.scale [10 100 1000 10000] [efficiency] [--data FOLDER]

Each number is a run of about so many batches, a read of 100,000 samples each, by the null engine, which answers at
once, on 4 workers, 5 batches in a bundle. `efficiency` is a run on 4 workers whose engines take 1 s per batch, in
bundles of a minute. CPU is user and system seconds; Prefect's server is a process of its own. What a run of one batch
costs is taken off.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from rich.console import Console
from rich.table import Table

from infra.prefect_server import prefect_api
from tasks.formats.planfile import read_plan
from tasks.formats.workspace import Workspace
from tests.benchmarks.cost import Cost, make_run, measure

WORKERS = 4
READ = 100_000
SIZES = (10, 100, 1000, 10_000)
#: Samples per second and engine, in the run that tells how busy they are.
RATE = 2_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """One run's figures."""

    cost: Cost
    batches: int
    task_runs: int
    wall: float
    server_cpu: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is named; all, when nothing is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="a number of batches, or efficiency; default: all")
    parser.add_argument("--data", type=Path, help="keep the replayed runs here, for the next time")
    given = parser.parse_args(arguments)
    cases = given.cases or [*map(str, SIZES), "efficiency"]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        site = work / "site.toml"
        site.write_text(f'name = "bench"\nworkers = {WORKERS}\n')
        with prefect_api(log_folder=work, announce=print) as url:
            if sizes := [int(case) for case in cases if case != "efficiency"]:
                one = make_run(work / "one", reads=1, mean=READ, per_file=1)
                start = scaled(one, work / "out-one", site, url)
                runs = []
                for size in sizes:
                    data = make_run((given.data or work) / f"scale-{size}", reads=size, mean=READ, per_file=1000)
                    runs.append(scaled(data, work / f"out-{size}", site, url, *bundled(READ, 5)))
                show(start, runs)
            if "efficiency" in cases:
                reads = WORKERS * 2 * 60 * RATE // READ
                data = make_run((given.data or work) / f"efficiency-{reads}", reads=reads, mean=READ, per_file=1000)
                options = ("--rate", str(RATE), *bundled(RATE, 60))
                busy = measure(data, work / "out-efficiency", site, *options).busy / WORKERS
                Console().print(f"{WORKERS} engines of {RATE:,} samples/s busy: {busy:.1%}")


def bundled(samples: int, batches: int) -> tuple[str, ...]:
    """Return the options for batches of so many samples, so many of them in a bundle."""
    return "--batch-samples", str(samples), "--bundle-samples", str(samples * batches)


def scaled(data: Path, out: Path, site: Path, url: str, *options: str) -> Scaled:
    """Run the command, and see what Prefect's server spends on it."""
    (server,) = (child for child in psutil.Process(os.getpid()).children() if "server" in child.cmdline())
    before, tasks, began = cpu(server), task_runs(url), time.monotonic()
    cost = measure(data, out, site, *options)
    wall = time.monotonic() - began
    return Scaled(
        cost=cost,
        batches=len(read_plan(Workspace(out)).batches),
        task_runs=task_runs(url) - tasks,
        wall=wall,
        server_cpu=cpu(server) - before,
    )


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def task_runs(url: str) -> int:
    return int(httpx.post(f"{url}/task_runs/count", json={}, timeout=60).raise_for_status().json())


def show(start: Scaled, runs: Sequence[Scaled]) -> None:
    """Print the figures of all runs."""
    table = Table("figure", *(f"{run.batches:,} batches" for run in runs))

    def row(name: str, *cells: str) -> None:
        table.add_row(name, *cells)

    def per_batch(run: Scaled, spent: float, at_start: float) -> str:
        return f"{1e3 * max(spent - at_start, 0) / run.batches:.1f}"

    row("wall, s", *(f"{run.wall:.1f}" for run in runs))
    row("task runs", *(f"{run.task_runs:,}" for run in runs))
    row("CPU of flow per batch, ms", *(per_batch(run, run.cost.flow_cpu, start.cost.flow_cpu) for run in runs))
    row(
        "CPU of workers per batch, ms",
        *(per_batch(run, run.cost.cpu - run.cost.flow_cpu, start.cost.cpu - start.cost.flow_cpu) for run in runs),
    )
    row("CPU of Prefect's server per batch, ms", *(per_batch(run, run.server_cpu, start.server_cpu) for run in runs))
    row("wall per batch, ms", *(per_batch(run, run.wall, start.wall) for run in runs))
    row("memory of the flow, MB", *(f"{run.cost.flow_memory:.0f}" for run in runs))
    row("memory of a worker, MB", *(f"{run.cost.worker_memory:.0f}" for run in runs))
    Console().print(table)


if __name__ == "__main__":
    main()
