"""A run in words: what launch planned, what came of it, and where it came from."""

from __future__ import annotations

import platform
import socket
import sys
from collections import Counter
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tasks.core.calls import EngineIdentity
from tasks.core.plan import Plan
from tasks.core.result import MergedRun
from tasks.settings import RunSettings

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
