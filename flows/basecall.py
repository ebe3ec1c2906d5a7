"""The flow `basecall`: launch, split, merge; each a sub-flow, legible in the UI."""

from __future__ import annotations

from functools import partial
from typing import TypeVar
from uuid import UUID

from prefect import Flow, Task, flow, get_client, get_run_logger, tags, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact
from prefect.runtime import flow_run

from flows.parameters import spread
from flows.rounds import call_in_rounds
from flows.telling import QUARANTINED, tell
from infra.cluster import Cluster, open_cluster, open_stage, opened_cluster, task_runner
from infra.confines import confine, umask_of
from infra.engines import engine_opener, launch_warnings
from infra.lock import alone
from infra.site import Site, load_site
from infra.slurm_preflight import cancel_orphans
from infra.workers import clear_heartbeats
from tasks.core.errors import ShoalError
from tasks.core.plan import Plan
from tasks.core.result import MergedRun
from tasks.engines.registry import slots_of
from tasks.formats.commit import clear_staging
from tasks.formats.planfile import read_plan
from tasks.formats.workspace import Workspace, run_id_of
from tasks.launch import estimated_seconds, launch, with_kept_sheet
from tasks.merge import merge
from tasks.report import plan_markdown, result_markdown, run_tags, run_title
from tasks.settings import RunSettings

Result = TypeVar("Result")


def basecall(settings: RunSettings) -> MergedRun:
    """Call every read of the input once, and prove it.

    Safe to repeat: what is committed is not called again.
    """
    site = load_site(settings.site)
    confine(settings)
    workspace = Workspace(settings.out)
    with umask_of(site):
        workspace.create()
        with alone(workspace.lock, announce=get_run_logger().info):
            return _basecall(settings, site, workspace)


def _basecall(settings: RunSettings, site: Site, workspace: Workspace) -> MergedRun:
    clear_heartbeats(workspace.heartbeats)
    run_id = run_id_of(workspace)
    if site.kind == "slurm" and (orphans := cancel_orphans(run_id)):
        get_run_logger().warning("cancelled %d Slurm jobs that an earlier flow of this run had left", orphans)
    clear_staging(workspace)
    jobs = partial(open_stage, site, logs=workspace.logs, log_level=settings.log_level, run_id=run_id)
    with jobs(site.launch) as cluster:
        plan = _on(launch_flow, cluster)(settings)
    labels = run_tags(plan, engine=settings.engine.kind, site=site.name)
    with get_client(sync_client=True) as client:
        client.update_flow_run(flow_run.id, name=run_title(plan), tags=sorted({*flow_run.tags, *labels}))
    # People look for artifacts where the run is, not in its stages.
    create_markdown_artifact(_plan_in_words(plan, settings), key="plan", description="What is in the input")
    progress: UUID = create_progress_artifact(  # type: ignore[assignment]
        0.0, key="progress", description="Samples called and committed"
    )
    for warning in launch_warnings(site, settings.engine):
        get_run_logger().warning(warning)
    engine = engine_opener(
        site, settings.engine, reference=settings.output.reference, out=settings.out, logs=workspace.logs
    )
    with (
        tags(*labels),
        open_cluster(
            site,
            engine,
            slots=slots_of(settings.engine),
            logs=workspace.logs,
            log_level=settings.log_level,
            run_id=run_id,
        ) as cluster,
    ):
        _on(split_flow, cluster)(settings, progress)
    clear_staging(workspace)  # of workers that were killed, and of attempts that others have superseded
    with tags(*labels), jobs(site.merge) as cluster:
        merged = _on(merge_flow, cluster)(settings)
    create_markdown_artifact(result_markdown(merged), key="result", description="What came of the run")
    if merged.quarantined:
        words = f"{merged.quarantined:,} of {merged.reads:,} reads are quarantined; the ledger says why"
        tell(workspace, QUARANTINED, words, quarantined=merged.quarantined, reads=merged.reads)
    return merged


def _plan_in_words(plan: Plan, settings: RunSettings) -> str:
    slots = load_site(settings.site).slots_in_all(slots_of(settings.engine))
    return plan_markdown(plan, estimated_seconds=estimated_seconds(plan.batches, settings, slots=slots))


def launch_stage(settings: RunSettings) -> Plan:
    """Scan the input and write the plan."""
    _run(write_plan_task, settings)
    return read_plan(Workspace(settings.out))


def write_the_plan(settings: RunSettings) -> None:
    """Plan the run; the plan stays in its folder, for it may be large."""
    launch(settings)


def split_stage(settings: RunSettings, progress: UUID) -> None:
    """Call what is not committed yet, in rounds; `progress` is the artifact that shows how far it is."""
    site, settings = load_site(settings.site), with_kept_sheet(settings)
    if site.split.bundle_size is not None:
        size = max(site.split.bundle_size * settings.batch_samples, 100_000)
        settings = settings.model_copy(update={"bundle_samples": size})
    cluster = opened_cluster()
    if cluster is None:
        raise ShoalError("split runs in the block of open_cluster")
    call_in_rounds(settings, cluster, site, progress)


def merge_stage(settings: RunSettings) -> MergedRun:
    """Prove the ledger and write the result."""
    return _run(merge_task, settings)


def _on(stage: Flow[..., Result], cluster: Cluster | None) -> Flow[..., Result]:
    return stage.with_options(task_runner=task_runner(cluster)) if cluster else stage


def _run(work: Task[[RunSettings], Result], settings: RunSettings) -> Result:
    """Do a stage's work: here, or on the stage's own worker, telling how that comes along."""
    cluster = opened_cluster()
    if cluster is None:
        return work.fn(settings)
    future = work.submit(settings)
    while True:
        for news in cluster.news():
            get_run_logger().info("%s", news)
        try:
            return future.result(timeout=5)
        except TimeoutError:
            continue


write_plan_task = task(name="write-plan")(write_the_plan)
merge_task = task(name="write-result")(merge)
launch_flow = flow(name="launch", flow_run_name="launch · {settings.out.name}", validate_parameters=False)(launch_stage)
split_flow = flow(name="split", flow_run_name="split · {settings.out.name}", validate_parameters=False)(split_stage)
merge_flow = flow(name="merge", flow_run_name="merge · {settings.out.name}", validate_parameters=False)(merge_stage)
basecall_flow = flow(name="basecall", flow_run_name="{out.name}")(spread(basecall, RunSettings))
