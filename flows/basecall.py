"""The flow `basecall`: launch, split, merge; each a sub-flow, legible in the UI."""

from __future__ import annotations

from functools import partial
from uuid import UUID

from prefect import flow, get_client, tags
from prefect.artifacts import create_markdown_artifact, create_progress_artifact
from prefect.runtime import flow_run

from flows.parameters import spread
from flows.rounds import call_in_rounds
from infra.cluster import open_cluster, task_runner
from infra.site import load_site
from tasks.core.plan import Plan
from tasks.core.result import MergedRun
from tasks.engines.registry import open_engine, samples_per_second, slots_of
from tasks.formats.lock import alone
from tasks.formats.workspace import Workspace
from tasks.launch import launch
from tasks.merge import merge
from tasks.report import plan_markdown, result_markdown, run_tags, run_title
from tasks.settings import RunSettings


def basecall(settings: RunSettings) -> MergedRun:
    """Call every read of the input once, and prove it.

    Safe to repeat: what is committed is not called again.
    """
    workspace = Workspace(settings.out)
    with alone(workspace.lock, what=workspace.out):
        return _basecall(settings)


def _basecall(settings: RunSettings) -> MergedRun:
    plan = launch_flow(settings)
    labels = run_tags(plan, settings)
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, name=run_title(plan), tags=sorted({*flow_run.tags, *labels}))
    # People look for artifacts where the run is, not in its stages.
    create_markdown_artifact(_plan_in_words(plan, settings), key="plan", description="What is in the input")
    progress: UUID = create_progress_artifact(  # type: ignore[assignment]
        0.0, key="progress", description="Samples called and committed"
    )
    engine = partial(open_engine, settings.engine)
    with (
        tags(*labels),
        open_cluster(
            load_site(settings.site),
            engine,
            slots=slots_of(settings.engine),
            logs=Workspace(settings.out).logs,
            log_level=settings.log_level,
        ) as cluster,
    ):
        split_flow.with_options(task_runner=task_runner(cluster))(settings, cluster.slots, progress)
    with tags(*labels):
        merged = merge_flow(settings)
    create_markdown_artifact(result_markdown(merged), key="result", description="What came of the run")
    return merged


def _plan_in_words(plan: Plan, settings: RunSettings) -> str:
    slots = load_site(settings.site).slots_in_all(slots_of(settings.engine))
    return plan_markdown(plan, samples_per_second=samples_per_second(settings.engine) * slots)


def launch_stage(settings: RunSettings) -> Plan:
    """Scan the input and write the plan."""
    return launch(settings).plan


def split_stage(settings: RunSettings, slots: int, progress: UUID) -> None:
    """Call what is not committed yet, in rounds; `progress` is the artifact that shows how far it is."""
    call_in_rounds(settings, slots, progress)


def merge_stage(settings: RunSettings) -> MergedRun:
    """Prove the ledger and write the result."""
    return merge(settings)


launch_flow = flow(name="launch", flow_run_name="launch · {settings.out.name}", validate_parameters=False)(launch_stage)
split_flow = flow(name="split", flow_run_name="split · {settings.out.name}", validate_parameters=False)(split_stage)
merge_flow = flow(name="merge", flow_run_name="merge · {settings.out.name}", validate_parameters=False)(merge_stage)
basecall_flow = flow(name="basecall", flow_run_name="{out.name}")(spread(basecall, RunSettings))
