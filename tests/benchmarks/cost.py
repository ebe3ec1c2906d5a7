"""What a run costs: CPU seconds per 1e9 samples, memory, the share of each stage, and how busy the engine is.

    python -m tests.benchmarks.cost [long] [short] [tiny] [busy] [--samples 1e9] [--data FOLDER]

Replays real signal as a run, calls it with the null engine through `shoal run`, and prints a table. CPU is user and
system seconds of the command and everything it started, workers included; Prefect's server runs apart and is left out.
`start` is the same command on a run of one read: what a run costs before its first sample. The rest is per sample.
`waiting` is what flow and worker take together while the engine calls that one read for a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from infra.prefect_server import prefect_api
from tasks.core.plan import Plan
from tasks.formats.commit import read_manifest
from tasks.formats.planfile import read_plan
from tasks.formats.replay import ReplaySettings, bundled_source, replay
from tasks.formats.workspace import Workspace, read_json
from tasks.metrics import STAGES

SHOAL = Path(sys.executable).with_name("shoal")
#: Seconds for which the engine is waited for.
WAIT = 60
#: Samples per read and reads per file of each case, and the command's options.
CASES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "long": (50_000, 1000, ()),
    "short": (3_000, 20_000, ()),
    "tiny": (10_000, 10, ()),
    "busy": (50_000, 1000, ("--rate", "2e7", "--batch-samples", "20000000")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One run's figures."""

    reads: int
    samples: int
    #: Seconds; of the command with all it started, and of its own process.
    cpu: float
    flow_cpu: float
    #: MB; the largest of the worker processes, and the command itself.
    worker_memory: float
    flow_memory: float
    busy: float
    #: CPU seconds by stage.
    stages: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases that are named; all, when none is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--samples", type=float, default=1e9)
    parser.add_argument("--data", type=Path, help="keep the replayed runs here, for the next time")
    given = parser.parse_args(arguments)
    if unknown := set(given.cases) - set(CASES):
        parser.error(f"no case {unknown.pop()!r}; there are {', '.join(CASES)}")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        site = work / "site.toml"
        site.write_text('name = "bench"\nworkers = 1\n')
        with prefect_api(log_folder=work, announce=print):
            one = make_run(work / "one", reads=1, mean=50_000, per_file=1)
            start = measure(one, work / "out-one", site)
            slow = measure(one, work / "out-slow", site, "--rate", str(start.samples / WAIT))
            costs = {}
            for case in given.cases or CASES:
                mean, per_file, options = CASES[case]
                reads = int(given.samples / mean)
                data = (given.data or work) / f"{case if case != 'busy' else 'long'}-{reads}"
                costs[case] = measure(
                    make_run(data, reads=reads, mean=mean, per_file=per_file), work / f"out-{case}", site, *options
                )
    show(start, (slow.cpu - start.cpu) / WAIT, costs)


def make_run(folder: Path, *, reads: int, mean: int, per_file: int) -> Path:
    """Replay a run, unless it is there already."""
    if not folder.exists():
        settings = ReplaySettings(reads=reads, reads_per_file=per_file, channels=512, mean_samples=mean)
        for _ in replay([bundled_source()], folder, settings):
            pass
    return folder


def measure(data: Path, out: Path, site: Path, *options: str) -> Cost:
    """Run the command and watch its processes."""
    command = [SHOAL, "run", data, "--out", out, "--engine", "null", "--site", site, "--json", *options]
    with (out.parent / f"{out.name}.json").open("w") as output:
        process = subprocess.Popen(command, stdout=output)
        memory = _Memory(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        memory.done.set()
        memory.thread.join()
    if status:
        raise SystemExit(f"{command} ended with status {os.waitstatus_to_exitcode(status)}")
    result = json.loads((out.parent / f"{out.name}.json").read_text())
    workspace = Workspace(out)
    plan = read_plan(workspace)
    return Cost(
        reads=result["reads"],
        samples=sum(batch.samples for batch in plan.batches),
        cpu=usage.ru_utime + usage.ru_stime,
        flow_cpu=memory.flow_cpu,
        worker_memory=memory.workers / 1e6,
        flow_memory=memory.flow / 1e6,
        busy=_busy(workspace, plan, float(options[1]) if options else 0.0),
        stages={name: figures["cpu"] for name, figures in read_json(workspace.provenance)["metrics"].items()},
    )


class _Memory:
    """Watches the resident memory of a command and its children, and its own CPU seconds."""

    def __init__(self, pid: int) -> None:
        self.done = threading.Event()
        self.flow = self.workers = 0
        self.flow_cpu = 0.0
        self.thread = threading.Thread(target=self._watch, args=(psutil.Process(pid),), daemon=True)
        self.thread.start()

    def _watch(self, root: psutil.Process) -> None:
        while not self.done.wait(0.2):
            try:
                self.flow = max(self.flow, root.memory_info().rss)
                self.flow_cpu = sum(root.cpu_times()[:2])
                for child in root.children(recursive=True):
                    self.workers = max(self.workers, child.memory_info().rss)
            except psutil.NoSuchProcess:
                continue


def _busy(workspace: Workspace, plan: Plan, rate: float) -> float:
    """Return the share of the time, first batch begun to last committed, that the engine's rate accounts for."""
    if not rate:
        return 0.0
    manifests = [read_manifest(workspace, batch.batch_id) for batch in plan.batches]
    # A batch begins when its first answer is there: the engine has been at it for as long as that read takes.
    span = max(manifest["ended"] for manifest in manifests) - min(manifest["began"] for manifest in manifests)
    return sum(batch.samples for batch in plan.batches) / rate / span


def show(start: Cost, waiting: float, costs: dict[str, Cost]) -> None:
    """Print the figures of all cases."""
    title = f"start alone: {start.cpu:.1f} CPU s; waiting: {waiting:.1%} of a core"
    table = Table("figure", *costs, title=title, title_justify="left")

    def row(name: str, *cells: str) -> None:
        table.add_row(name, *cells)

    each = list(costs.values())
    row("reads", *(f"{cost.reads:,}" for cost in each))
    row("samples", *(f"{cost.samples:.3g}" for cost in each))
    row("CPU s", *(f"{cost.cpu:.1f}" for cost in each))
    row("CPU s per 1e9 samples", *(f"{1e9 * cost.cpu / cost.samples:.1f}" for cost in each))
    row("  without start", *(f"{1e9 * (cost.cpu - start.cpu) / cost.samples:.1f}" for cost in each))
    row("µs per read", *(f"{1e6 * cost.cpu / cost.reads:.0f}" for cost in each))
    row("  without start", *(f"{1e6 * (cost.cpu - start.cpu) / cost.reads:.0f}" for cost in each))
    row("memory of a worker, MB", *(f"{cost.worker_memory:.0f}" for cost in each))
    row("memory of the flow, MB", *(f"{cost.flow_memory:.0f}" for cost in each))
    row("engine busy", *(f"{cost.busy:.1%}" if cost.busy else "" for cost in each))
    for stage in STAGES:
        row(f"  {stage.replace('_', ' ')}", *(f"{cost.stages.get(stage, 0) / cost.cpu:.1%}" for cost in each))
    rest = (1 - sum(cost.stages.values()) / cost.cpu for cost in each)
    row("  start, launch, merge, Prefect, Dask", *(f"{share:.1%}" for share in rest))
    Console().print(table)


if __name__ == "__main__":
    main()
