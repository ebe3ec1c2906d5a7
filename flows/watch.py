"""The flow `watch`: one look at the folders that sequencers write into, and a call of each run that needs one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prefect import flow, get_client, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

from flows.basecall import basecall_flow
from flows.parameters import spread
from infra.confines import confine, umask_of
from infra.lock import alone, held
from infra.site import load_site
from tasks.core.errors import SettingsError
from tasks.formats.workspace import Workspace
from tasks.watch import STATE, Call, Look, RunSeen, covered, look, note_failure
from tasks.watch_settings import WatchSettings

#: States of a flow run that is still to end.
UNDER_WAY = ("SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING")
#: Flow runs asked for at once: Prefect's own limit.
PAGE = 200
#: What came of asking for a call: it is under way or done, it ended without a result, or a person has cancelled it.
Outcome = Literal["called", "ended", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What a look saw, and what came of the calls it started."""

    look: Look
    #: Output folders of the runs called, by outcome.
    started: tuple[str, ...]
    failed: tuple[str, ...]
    cancelled: tuple[str, ...] = ()


def watch(settings: WatchSettings) -> Watched:
    """Look once at the folders, and call what is new.

    Safe to repeat and to run twice: a call has a key made of its input.
    """
    confine(settings)
    with umask_of(load_site(settings.site)):
        return _watch(settings)


def _watch(settings: WatchSettings) -> Watched:
    log = get_run_logger()
    (settings.out / STATE).mkdir(parents=True, exist_ok=True)
    with alone(settings.out / STATE / "lock", announce=log.info):
        # Before the look: a call that ends in between has then left its result for it to see.
        under_way = outs_under_way() if settings.deployment else frozenset()
        seen = look(settings, now=time.time())
        for path, problem in seen.problems:
            log.warning("%s: %s", path, problem)
        show(seen)
        outs: dict[Outcome, list[str]] = {"called": [], "ended": [], "cancelled": []}
        for run in seen.calls:
            if run.call is None or run.out in under_way or held(Workspace(Path(run.out)).lock):
                continue
            log.info("calling %s (%s) into %s", run.folder, run.why, run.out)
            outcome = ask(settings.deployment, run.call) if settings.deployment else call_here(run.call)
            outs[outcome].append(run.out)
            if outcome == "ended":
                log.warning("the call of %s failed, or its result is gone; the next look tries again", run.folder)
                note_failure(settings, run.call)
            elif outcome == "cancelled":
                log.warning(
                    "the call of %s was cancelled and is not started again until new files come; to start it now, "
                    "retry its flow run in Prefect's UI, or by `prefect flow-run retry`",
                    run.folder,
                )
    return Watched(
        look=seen, started=tuple(outs["called"]), failed=tuple(outs["ended"]), cancelled=tuple(outs["cancelled"])
    )


def call_here(call: Call) -> Outcome:
    """Call a run in this process; it is called when its result holds all of the input."""
    state: State = basecall_flow(**dict(call.settings), return_state=True)  # type: ignore[assignment]
    return "called" if state.is_completed() and covered(call.settings) else "ended"


def ask(deployment: str, call: Call) -> Outcome:
    """Ask a deployment to call a run, once per key: Prefect returns the flow run that has the key already.

    One that has ended, however, started nothing: a look asks only for what is not there, so it failed, or its result
    was removed since. One that was cancelled is left alone, since a person wanted that; new files have another key.

    Raises:
        SettingsError: there is no such deployment.
    """
    try:
        asked: FlowRun = run_deployment(  # type: ignore[assignment]
            deployment,
            parameters=call.settings.model_dump(mode="json"),
            idempotency_key=call.key,
            timeout=0,
            as_subflow=False,
            flow_run_name=call.settings.out.name,
            tags=["watch"],
        )
    except ObjectNotFound as error:
        raise SettingsError(
            f"deployment: {deployment!r} is not on this Prefect server; `shoal deploy` puts basecall/local and "
            "basecall/slurm on the one that PREFECT_API_URL names"
        ) from error
    if asked.state is None or not asked.state.is_final():
        return "called"
    return "cancelled" if asked.state.is_cancelled() else "ended"


def outs_under_way() -> frozenset[str]:
    """List the output folders of basecall flow runs that have not ended."""
    outs: set[str] = set()
    offset = 0
    with get_client(sync_client=True) as client:
        while True:
            page = client.read_flow_runs(
                flow_filter=FlowFilter.model_validate({"name": {"any_": ["basecall"]}}),
                flow_run_filter=FlowRunFilter.model_validate(
                    {"state": {"type": {"any_": [StateType(name) for name in UNDER_WAY]}}}
                ),
                limit=PAGE,
                offset=offset,
            )
            outs |= {str(run.parameters.get("out")) for run in page}
            offset += PAGE
            if len(page) < PAGE:
                return frozenset(outs)


def show(seen: Look) -> None:
    """Show a look in Prefect: one table, of runs that are not over and of those that can't be called."""
    open_runs = [run for run in seen.runs if run.action != "closed"]
    create_table_artifact(
        [_row(run) for run in open_runs] or [{"run": "none", "state": "nothing is being written"}],
        key="watch",
        description=f"{len(seen.runs)} runs, {len(open_runs)} of them open, {len(seen.problems)} problems",
    )


def _row(run: RunSeen) -> dict[str, str | int]:
    return {
        "run": run.folder,
        "state": run.action,
        "why": run.why,
        "files": run.files,
        "being written": run.growing,
        "unusable": len(run.unusable),
        "reads": run.reads,
        "output": run.out,
    }


watch_flow = flow(name="watch", flow_run_name="watch · {out.name}")(spread(watch, WatchSettings))
