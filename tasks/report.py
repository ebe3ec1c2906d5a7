"""A run in words: what launch planned, what came of it, and where it came from."""

from __future__ import annotations

import platform
import socket
import sys
from collections import Counter
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tasks.core.calls import EngineIdentity
from tasks.core.plan import Plan
from tasks.core.result import MergedRun
from tasks.settings import RunSettings

#: Tags of a kind, at most.
TAGS = 4
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
        "engine": asdict(identity),
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


def run_tags(plan: Plan, settings: RunSettings) -> list[str]:
    """Tag a run by what people search for: site, engine, and flow cells and run ids, a few of them."""
    cells = sorted({run.info.flow_cell_id for run in plan.runs} - {""})
    ids = sorted({run.info.acquisition_id[:8] for run in plan.runs})
    site = Path(settings.site).stem
    return [f"engine:{settings.engine.kind}", f"site:{site}", *cells[:TAGS], *(f"run:{name}" for name in ids[:TAGS])]


def plan_markdown(plan: Plan) -> str:
    """Say what is in the input and what is planned, as markdown."""
    lines = ["| run | flow cell | kit | reads | samples | |", "|---|---|---|---:|---:|---|"]
    for run in plan.runs:
        info = run.info
        verdict = f"refused: {run.refused}" if run.refused else "called"
        lines.append(
            f"| `{info.acquisition_id[:8]}` | {info.flow_cell_id or 'unknown'} {info.flow_cell_product_code} "
            f"| {info.sequencing_kit} | {run.reads:,} | {run.samples:,} | {verdict} |"
        )
    lines += ["", f"{len(plan.files):,} files, {len(plan.batches):,} batches"]
    return "\n".join([*lines, *_flawed(plan)])


def result_markdown(merged: MergedRun) -> str:
    """Say what came of a run, as markdown."""
    return "\n".join(
        [
            f"**{merged.reads:,} reads**, each with one fate: {merged.called:,} called, {merged.skipped:,} skipped, "
            f"{merged.quarantined:,} quarantined.",
            "",
            f"{merged.records:,} records ({merged.passed:,} pass), {merged.bases:,} bases in {merged.out}:",
            "",
            *(f"- `{folder}`" for folder in merged.folders),
        ]
    )


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
