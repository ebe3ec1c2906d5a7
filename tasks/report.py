"""A run in words: what launch planned, what came of it, and where it came from."""

from __future__ import annotations

import platform
import socket
import sys
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from tasks.core.calls import EngineIdentity
from tasks.core.crew import WorkerFigures, figures_of, slow_workers
from tasks.core.plan import Plan
from tasks.core.result import MergedRun
from tasks.core.statistics import histogram_svg, record_statistics, short
from tasks.engines.registry import quality_of
from tasks.formats.commit import committed_ids, read_manifest
from tasks.formats.workspace import Workspace, read_crew, read_json
from tasks.settings import RunSettings

#: Tags of a kind, at most.
TAGS = 4
#: Quarantined reads that are named in a result.
LISTED = 20
#: What provenance gives the versions of.
PACKAGES = (
    "shoal",
    "prefect",
    "prefect-dask",
    "distributed",
    "pod5",
    "polars",
    "pyarrow",
    "numpy",
    "isal",
    "onnxruntime",
    "ont-pybasecall-client-lib",
)


def provenance(settings: RunSettings, identity: EngineIdentity) -> dict[str, Any]:
    """Tell what made a result: settings, engine, model digest, versions, host."""
    return {
        "settings": settings.model_dump(mode="json"),
        "engine": {**asdict(identity), "quality": quality_of(settings.engine, identity)},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "host": {"name": socket.gethostname(), "system": platform.platform(), "command": sys.argv},
    }


def run_title(plan: Plan) -> str:
    """Name a run for people, after its largest acquisition: `FAX12345 sample-7 20261122`."""
    runs = sorted(plan.runs, key=lambda run: run.samples, reverse=True)
    if not runs:
        return "nothing to call"
    info = runs[0].info
    started = f"{info.acquisition_start_time:%Y%m%d}" if info.acquisition_start_time else ""
    others = f"and {len(runs) - 1} more" if len(runs) > 1 else ""
    return " ".join(filter(None, (info.flow_cell_id or "unknown", info.sample_id, started, others)))


def run_tags(plan: Plan, *, engine: str, site: str) -> list[str]:
    """Tag a run by what people search for: site, engine, and flow cells and run ids, a few of them."""
    cells = sorted({run.info.flow_cell_id for run in plan.runs} - {""})
    ids = sorted({run.info.acquisition_id[:8] for run in plan.runs})
    return [f"engine:{engine}", f"site:{site}", *cells[:TAGS], *(f"run:{name}" for name in ids[:TAGS])]


def plan_markdown(plan: Plan, *, estimated_seconds: float = 0.0) -> str:
    """Say what is in the input and what is planned, as markdown.

    Args:
        estimated_seconds: How long calling will take; 0: unknown.
    """
    lines = ["| run | flow cell | kit | reads | samples | |", "|---|---|---|---:|---:|---|"]
    for run in plan.runs:
        info = run.info
        verdict = f"refused: {run.refused}" if run.refused else "called"
        lines.append(
            f"| `{info.acquisition_id[:8]}` | {info.flow_cell_id or 'unknown'} {info.flow_cell_product_code} "
            f"| {info.sequencing_kit} | {run.reads:,} | {run.samples:,} | {verdict} |"
        )
    samples = sum(batch.samples for batch in plan.batches)
    reads = sum(batch.reads for batch in plan.batches)
    lines += ["", f"{len(plan.files):,} files, {reads:,} reads, {samples:,} samples in {len(plan.batches):,} batches."]
    if estimated_seconds:
        lines += ["", f"Estimated time: {timedelta(seconds=round(estimated_seconds))}."]
    return "\n".join([*lines, *_flawed(plan)])


def result_markdown(merged: MergedRun) -> str:
    """Say what came of a run, as markdown: yield, quality, the ledger, plots, what was quarantined, where it is."""
    lengths, qscores, passes = _records(merged)
    figures = record_statistics(lengths, qscores, passes)
    workspace = Workspace(Path(merged.out))
    seconds = _calling_seconds(workspace)
    workers = figures_of(read_manifest(workspace, batch_id) for batch_id in sorted(committed_ids(workspace)))
    rows = [
        ("Reads", f"{merged.reads:,}: {merged.called:,} called, {merged.skipped:,} skipped, "
         f"{merged.quarantined:,} quarantined"),
        ("Records", f"{merged.records:,}, of which {merged.passed:,} pass "
         f"({100 * merged.passed / max(merged.records, 1):.1f} %)"),
        ("Yield", f"{merged.bases:,} bases"),
        ("N50", f"{figures.n50:,} bases; the longest record has {figures.longest:,}"),
        ("Mean qscore", "no records" if figures.mean_qscore is None else
         f"{figures.mean_qscore:.1f} of the mean error; median {figures.median_qscore:.1f}"),
        ("Called by", called_by(workspace)),
        ("Calling took", f"{timedelta(seconds=round(seconds))}" if seconds else "unknown"),
        ("Workers", f"{len(workers)}, {sum(worker.seconds for worker in workers) / 3600:.2f} hours of them in all"),
    ]  # fmt: skip
    lines = ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows), ""]
    if len(lengths):
        weights = lengths.astype(float)
        by_length = histogram_svg(
            weights, title="Bases by read length", unit="bases", weights=weights, logarithmic=True
        )
        by_qscore = histogram_svg(qscores, title="Records by mean qscore", unit="mean qscore")
        lines += [_image("read lengths", by_length), _image("qscores", by_qscore), ""]
    lines += [*_quarantined(merged), *_troubled(workspace, workers)]
    return "\n".join([*lines, f"In `{merged.out}`:", "", *(f"- `{folder}`" for folder in merged.folders)])


def _records(merged: MergedRun) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Read length, mean qscore and verdict of each record off the sequencing summaries."""
    columns = {"sequence_length_template": pl.Int64, "mean_qscore_template": pl.Float64, "passes_filtering": pl.String}
    parts = [
        pl.scan_csv(file, separator="\t", infer_schema=False, glob=False).select(
            pl.col(name).cast(to) for name, to in columns.items()
        )
        for folder in merged.folders
        for file in sorted(Path(merged.out, folder).glob("sequencing_summary*.txt"))
    ]
    table = pl.concat(parts).collect() if parts else pl.DataFrame(schema=columns)
    length, qscore, verdict = (table[name] for name in columns)
    return length.to_numpy(), qscore.to_numpy(), (verdict == "TRUE").to_numpy()


def called_by(workspace: Workspace) -> str:
    """Name what called a finished run, and say what may be expected of its calls."""
    engine = (read_json(workspace.provenance) or {}).get("engine", {})
    name = f"{engine.get('model', 'unknown')} ({engine.get('engine', 'unknown')})"
    return "; ".join(filter(None, (name, engine.get("quality"))))


def _calling_seconds(workspace: Workspace) -> float:
    made = read_json(workspace.provenance) or {}
    began, ended = made.get("calling_began"), made.get("calling_ended")
    return float(ended - began) if began and ended else 0.0


def _image(name: str, svg: str) -> str:
    """Return a picture that needs no file: Prefect's UI shows data URIs, but strips inline SVG."""
    return f"![{name}](data:image/svg+xml;base64,{b64encode(svg.encode()).decode()})"


def _quarantined(merged: MergedRun) -> list[str]:
    """List quarantined reads, a few of them."""
    if not merged.quarantined:
        return []
    reads = (
        pl.scan_parquet(Workspace(Path(merged.out)).ledger, glob=False)
        .filter(pl.col("fate") == "quarantined")
        .select("read_id", "reason")
        .head(LISTED)
        .collect()
    )
    lines = [f"- `{read_id}`: {reason}" for read_id, reason in reads.iter_rows()]
    more = merged.quarantined - len(lines)
    return ["Quarantined:", "", *lines, *([f"- and {more:,} more in `ledger.parquet`"] if more else []), ""]


def _troubled(workspace: Workspace, workers: Sequence[WorkerFigures]) -> list[str]:
    """List workers that people should look at: those that were set aside, and slow ones."""
    rates = median([worker.samples_per_second for worker in workers] or [0.0])
    lines = [f"- {words}" for words in read_crew(workspace)[1]]
    lines += [
        f"- worker {worker.worker} is slow: {short(worker.samples_per_second)} samples/s; the median is {short(rates)}"
        for worker in slow_workers(workers)
    ]
    return ["Workers to look at:", "", *lines, ""] if lines else []


def _flawed(plan: Plan) -> list[str]:
    """List, by reason, the files that are not called whole; a few of each."""
    flawed = [file for file in plan.files if file.status != "ok"]
    counts = Counter(file.reason for file in flawed)
    lines = []
    for reason, count in counts.items():
        first = next(file for file in flawed if file.reason == reason)
        lines.append(f"- {count} × {reason}, e.g. `{first.path}`: {first.message}")
    return ["", "Not called whole:", "", *lines] if lines else []


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
