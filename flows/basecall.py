"""The flow `basecall`: launch, split, merge; each a sub-flow, legible in the UI."""

from __future__ import annotations

from functools import partial

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.rounds import call_in_rounds
from infra.cluster import open_cluster, task_runner
from infra.site import load_site
from tasks.core.result import MergedRun
from tasks.engines.registry import open_engine, slots_of
from tasks.launch import launch
from tasks.merge import merge
from tasks.report import plan_markdown, result_markdown
from tasks.settings import RunSettings


def basecall(settings: RunSettings) -> MergedRun:
    """Call every read of the input once, and prove it.

    Safe to repeat: what is committed is not called again.
    """
    launch_flow(settings)
    engine = partial(open_engine, settings.engine)
    with open_cluster(load_site(settings.site), engine, slots=slots_of(settings.engine)) as cluster:
        split_flow.with_options(task_runner=task_runner(cluster))(settings, cluster.slots)
    return merge_flow(settings)


def launch_stage(settings: RunSettings) -> None:
    """Scan the input and write the plan."""
    launched = launch(settings)
    create_markdown_artifact(plan_markdown(launched.plan), key="plan", description="What is in the input")


def split_stage(settings: RunSettings, slots: int) -> None:
    """Call what is not committed yet, in rounds."""
    call_in_rounds(settings, slots)


def merge_stage(settings: RunSettings) -> MergedRun:
    """Prove the ledger and write the result."""
    merged = merge(settings)
    create_markdown_artifact(result_markdown(merged), key="result", description="What came of the run")
    return merged


launch_flow = flow(name="launch", validate_parameters=False)(launch_stage)
split_flow = flow(name="split", validate_parameters=False)(split_stage)
merge_flow = flow(name="merge", validate_parameters=False)(merge_stage)
basecall_flow = flow(name="basecall", flow_run_name="{settings.out.name}")(basecall)
