"""What the command line shows: rich on a terminal, plain lines otherwise, or one JSON object for machines."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

from infra.preflight import Finding
from tasks.core.errors import SettingsError
from tasks.core.plan import Plan, PlannedFile
from tasks.core.result import MergedRun
from tasks.engines.catalogue import Model
from tasks.formats.workspace import Workspace
from tasks.metrics import STAGES
from tasks.progress import RunProgress, Watch
from tasks.report import called_by
from tasks.verify import VerifyReport
from tasks.watch import Look

#: Seconds between looks at the run folder; plain output gets a line each `PLAIN_EVERY` looks at most.
LOOK_EVERY = 0.5
PLAIN_EVERY = 10
#: Seconds between looks of `status --watch`.
FOLLOW_EVERY = 2.0
#: Lines shown of a long list; the run folder has the rest.
LISTED = 20
#: What people see for a figure's name, where that is not the name itself.
_LABELS = {"estimated_seconds": "estimated time", "estimated_bytes": "estimated disk"}

#: What a look did about a run, for people.
_WATCHED = {"call": "called", "wait": "waiting", "close": "closed"}


class Display:
    """Prints; decides nothing."""

    def __init__(self, *, json: bool) -> None:
        self._json = json
        self._out = Console(highlight=False, soft_wrap=True, emoji=False)  # a path may hold :x:
        self._err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

    def say(self, text: str) -> None:
        """Tell people what happens; standard error, so that JSON stays clean."""
        self._err.print(escape(text))

    def complain(self, text: str) -> None:
        """Tell people what is wrong."""
        self._err.print(f"[bold red]shoal:[/] {escape(text)}")

    def refusals(self, plan: Plan) -> None:
        """Name the runs that are not called, and why, before any work."""
        for run in plan.runs:
            if run.refused:
                self._err.print(f"[yellow]not called:[/] {escape(run.refused)} ({run.reads:,} reads)")

    def plan(self, plan: Plan, figures: dict[str, int]) -> None:
        if self._json:
            self._dump({**figures, "not_whole": [asdict(file) for file in _flawed(plan.files)]})
            return
        self._table(
            "plan",
            [(_LABELS.get(name, name.replace("_", " ")), _figure(name, value)) for name, value in figures.items()],
        )
        runs = Table("run", "flow cell", "kit", "Hz", "reads", "samples", "")
        for run in plan.runs:
            info = run.info
            cells = [info.acquisition_id[:8], info.flow_cell_id, info.sequencing_kit, str(info.sample_rate)]
            runs.add_row(*map(escape, cells), f"{run.reads:,}", f"{run.samples:,}", "refused" if run.refused else "")
        self._out.print(runs)
        self.refusals(plan)
        self.flawed(_flawed(plan.files))

    @contextmanager
    def progress(self, watch: Watch) -> Iterator[None]:
        """Show how far the run is while the block runs: a bar on a terminal, a line now and then otherwise."""
        done = threading.Event()
        show = self._bar if self._err.is_terminal and not self._json else self._lines
        thread = threading.Thread(target=show, args=(watch, done), daemon=True, name="display")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _bar(self, watch: Watch, done: threading.Event) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._err, transient=True) as bar:
            task = bar.add_task("starting workers", total=None)
            while True:
                last = done.wait(LOOK_EVERY)
                progress = watch.look()
                if progress and progress.samples_done:
                    bar.update(
                        task, description=_counts(progress), completed=progress.samples_done, total=progress.samples
                    )
                if last:
                    return

    def _lines(self, watch: Watch, done: threading.Event) -> None:
        shown, looks = -1, 0
        while True:
            last = done.wait(LOOK_EVERY)
            looks += 1
            progress = watch.look()
            if progress and progress.batches_done != shown and (last or looks % PLAIN_EVERY == 0):
                shown = progress.batches_done
                self.say(f"{100 * progress.samples_done / max(progress.samples, 1):5.1f} %  {_counts(progress)}")
            if last:
                return

    def result(self, merged: MergedRun, flawed: Sequence[PlannedFile]) -> None:
        """Show what a run folder holds: where, the yield, the ledger."""
        if self._json:
            self._dump({**asdict(merged), "not_whole": [asdict(file) for file in flawed]})
            return
        self._table(
            "ledger: every read has one fate",
            [
                ("reads in", f"{merged.reads:,}"),
                ("called", f"{merged.called:,}"),
                ("skipped", f"{merged.skipped:,}"),
                ("quarantined", f"{merged.quarantined:,}"),
            ],
        )
        self._table(
            "yield",
            [
                ("records", f"{merged.records:,} ({merged.passed:,} pass)"),
                ("bases", f"{merged.bases:,}"),
                ("mean length", f"{merged.bases / max(merged.records, 1):,.0f}"),
            ],
        )
        self._out.print(f"called by {called_by(Workspace(Path(merged.out)))}", markup=False)
        self._out.print(f"results in {merged.out}:", markup=False)
        for name in (*merged.folders, "ledger.parquet", "input_files.parquet", "provenance.json"):
            self._out.print(f"  {name}", markup=False)
        self.flawed(flawed)

    def flawed(self, files: Sequence[PlannedFile]) -> None:
        """List the input that was not called whole."""
        if not files:
            return
        counts = ", ".join(f"{count} {reason}" for reason, count in Counter(file.reason for file in files).items())
        self._err.print(f"[yellow]{len(files)} input files not called whole[/] ({escape(counts)}):")
        for file in files[:LISTED]:
            self._err.print(f"  {file.path}: {file.reason}: {file.message}", markup=False)
        if len(files) > LISTED:
            self._err.print(f"  … and {len(files) - LISTED} more: input_files.parquet has all")

    def status(self, progress: RunProgress, merged: MergedRun | None, *, metrics: bool) -> None:
        if self._json:
            self._dump({**asdict(progress), "merged": merged is not None})
            return
        state = "complete" if merged else "called, not merged" if progress.complete else "incomplete"
        self._table(
            state,
            [
                ("batches", f"{progress.batches_done:,} of {progress.batches:,}"),
                ("reads", f"{progress.reads_done:,} of {progress.reads:,}"),
                ("samples", f"{progress.samples_done:,} of {progress.samples:,}"),
                (
                    "called, skipped, quarantined",
                    f"{progress.called:,}, {progress.skipped:,}, {progress.quarantined:,}",
                ),
                ("bases", f"{progress.bases:,}"),
                ("samples/s", f"{progress.samples_per_second:,.0f}"),
            ],
        )
        if metrics:
            table = Table("stage", "wall s", "CPU s", "reads", "MB")
            for stage in STAGES:
                if figures := progress.metrics.get(stage):
                    cells = (f"{figures['wall']:.2f}", f"{figures['cpu']:.2f}", f"{figures['reads']:,}")
                    table.add_row(stage.replace("_", " "), *cells, f"{figures['bytes'] / 1e6:,.1f}")
            self._out.print(table)

    def watched(self, look: Look, *, failed: Sequence[str], cancelled: Sequence[str]) -> None:
        """Show what a look saw: the runs that are not over, and what is the matter."""
        if self._json:
            self._dump({**asdict(look), "failed": list(failed), "cancelled": list(cancelled)})
            return
        open_runs = [run for run in look.runs if run.action != "closed"]
        for run in open_runs[:LISTED]:
            state = _WATCHED.get(run.action, run.action)
            if run.out in failed:
                state = "failed, tried again"
            elif run.out in cancelled:
                state = "cancelled, not started again until new files come"
            self.say(f"{state}: {run.folder} ({run.why}; {run.files:,} files, {run.growing} being written)")
        if len(open_runs) > LISTED:
            self.say(f"… and {len(open_runs) - LISTED} more")
        for path, problem in look.problems[:LISTED]:
            self.say(f"not usable: {path}: {problem}")
        if not open_runs:
            self.say(f"{len(look.runs)} runs, all closed")

    def follow(self, workspace: Workspace, watch: Watch, stop: threading.Event, *, done: Callable[[], bool]) -> None:
        """Show a run again and again, until it is done or `stop` is set; plain lines where there is no screen."""
        from flows.pace import Pace, progress_words  # not at the top: Dask costs every command 0.8 s
        from infra.workers import read_heartbeats

        pace, began = Pace(), time.monotonic()
        first: RunProgress | None = None
        shown = ""
        with Live(console=self._err, transient=True, auto_refresh=False) as live:
            while not done() and not stop.is_set():
                progress = watch.look()
                if progress is None:
                    text, percent = "no plan yet", 0.0
                else:
                    first = first or replace(progress)
                    text = progress_words(progress, since=first, seconds=time.monotonic() - began)
                    percent = 100 * progress.samples_done / max(progress.samples, 1)
                if self._err.is_terminal:
                    live.update(
                        self._screen(
                            text, percent, pace.rows(list(read_heartbeats(workspace.heartbeats)), now=time.time())
                        ),
                        refresh=True,
                    )
                elif text != shown:
                    shown = text
                    self.say(f"{percent:5.1f} %  {text}")
                stop.wait(FOLLOW_EVERY)

    @staticmethod
    def _screen(text: str, percent: float, rows: Sequence[Mapping[str, object]]) -> Group:
        parts: list[RenderableType] = [f"{percent:5.1f} %  {escape(text)}", ProgressBar(total=100, completed=percent)]
        if rows:
            table = Table(*rows[0])
            for row in rows:
                table.add_row(*(escape(str(value)) for value in row.values()))
            parts.append(table)
        return Group(*parts)

    def verified(self, report: VerifyReport) -> None:
        if self._json:
            self._dump(asdict(report))
            return
        for fault in report.faults[:LISTED]:
            self._out.print(f"wrong: {fault}", markup=False)
        counts = (
            f"{report.reads:,} reads, {report.records:,} records, {report.values:,} values, {report.files:,} checksums"
        )
        verdict = f"{len(report.faults)} faults" if report.faults else "all hold"
        self._out.print(f"{counts}: {verdict}")

    def findings(self, findings: Sequence[Finding]) -> None:
        if self._json:
            self._dump([asdict(finding) for finding in findings])
            return
        for finding in findings:
            mark = "[red]✗[/]" if finding.fatal else "[green]✓[/]" if finding.good else "[yellow]![/]"
            self._out.print(f"{mark} {escape(finding.subject)}: {escape(finding.text)}")

    def models(self, found: Sequence[Model | SettingsError]) -> None:
        """Show the embedded engine's models, and why some can't be used."""
        usable = [model for model in found if not isinstance(model, SettingsError)]
        if self._json:
            self._dump([{**asdict(model), "bytes": model.bytes} for model in usable])
        for model in () if self._json else usable:
            fits = model.fits
            chemistry = (
                f"{fits.molecule.upper()} {' or '.join(fits.pores)}, {' or '.join(map(str, fits.speeds))} bases/s"
            )
            rates = " or ".join(str(rate // 1000) for rate in fits.sample_rates)
            rows = (
                ("chemistry", f"{chemistry}, {rates} kHz"),
                ("size", f"{model.bytes / 1e6:.1f} MB"),
                ("sha256", f"{model.digest[:16]}…"),
                ("quality", model.quality),
            )
            self._table(model.name, rows)
        for error in found:
            if isinstance(error, SettingsError):
                self.complain(str(error))

    def _table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        table = Table(title=title, title_justify="left", show_header=False)
        for row in rows:
            table.add_row(*map(escape, row))
        self._out.print(table)

    def _dump(self, value: Any) -> None:
        self._out.print(json.dumps(value, indent=1, default=str), markup=False)


def _counts(progress: RunProgress) -> str:
    reads = f"{progress.reads_done:,} of {progress.reads:,} reads"
    return f"{reads}, {progress.batches_done:,} of {progress.batches:,} batches"


def _flawed(files: Sequence[PlannedFile]) -> list[PlannedFile]:
    return [file for file in files if file.status != "ok"]


def _figure(name: str, value: int) -> str:
    if name == "estimated_seconds":
        hours, rest = divmod(value, 3600)
        return f"{hours} h {rest // 60} min {rest % 60} s"
    if name == "estimated_bytes":
        return f"{value / 1e9:,.2f} GB" if value > 1e9 else f"{value / 1e6:,.1f} MB"
    return f"{value:,}"
