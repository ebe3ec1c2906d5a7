"""Automations of a Prefect server: what it does when a run dies, hangs or ends badly. Installing them twice is once.

Prefect's events are lossy under load: these are for telling people and for clearing away what is dead. What is called,
and what is to be called again, stands in the run folders.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from prefect import get_client
from prefect.blocks.core import Block
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.states import Crashed

from flows.telling import ALIVE, ASIDE, ENDED, LATE, QUARANTINED

#: Seconds without a flow's heartbeat after which it is dead: three times what `shoal serve` sets them to.
SILENT_FOR = 90
ZOMBIES = "shoal: flow runs without a heartbeat are crashed"
#: How often a run that has crashed is started again: what kills it is hardly the machine, then.
RESTARTS = 3
#: Seconds after which it is: a crash may be reported twice.
RESTART_AFTER = 15
RESTARTED = "shoal: runs that crashed are started again"
FAILED = "shoal: tell when a run fails"
TROUBLED = "shoal: tell of quarantined reads, late runs, bad workers"
SILENT = "shoal: tell when the workers of a run are silent"
#: Seconds without a sign of life of a run's workers after which people are told; runs send one each minute.
SILENT_AFTER = 300.0
#: Flows that people want to hear of; their sub-flows would say the same again.
TOLD_OF = ("basecall", "watch")


def zombies() -> AutomationCore:
    """Crash flow runs whose process is gone: nothing else would ever end them."""
    return AutomationCore(
        name=ZOMBIES,
        description=f"A flow run that has given no sign of life for {SILENT_FOR} s is dead.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENT_FOR),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=f"no heartbeat for {SILENT_FOR} s")],
    )


def restarts() -> AutomationCore:
    """Start basecall runs of deployments again that crashed: they go on from what is committed."""
    return AutomationCore(
        name=RESTARTED,
        description=f"A basecall that crashed is scheduled again, {RESTARTS} times at most; what is committed stays.",
        trigger=EventTrigger(
            after={"prefect.flow-run.Crashed"},
            expect={f"prefect.flow-run.{state}" for state in ("AwaitingRetry", "Scheduled", "Pending", "Running")},
            for_each={"prefect.resource.id"},
            match=ResourceSpecification(
                {
                    "prefect.resource.id": ["prefect.flow-run.*"],
                    "prefect.run-count": [str(count) for count in range(1, RESTARTS + 1)],
                }
            ),
            match_related=[
                ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": "basecall"}),
                # Its sub-flows have none, nor has a run of the command line: the same command goes on with that.
                ResourceSpecification({"prefect.resource.role": "deployment"}),
            ],
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=RESTART_AFTER),
        ),
        actions=[
            ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message="started again: it crashed")
        ],
    )


def failures(block: Any) -> AutomationCore:
    """Tell people by a notification block (Slack, e-mail, webhook) that a run has failed or crashed."""
    return AutomationCore(
        name=FAILED,
        description="Sends a message when a basecall or a watch fails or crashes.",
        trigger=EventTrigger(
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=[
                ResourceSpecification(
                    {
                        "prefect.resource.role": "flow",
                        "prefect.resource.name": list(TOLD_OF),
                    }
                )
            ],
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[
            SendNotification(
                block_document_id=block,
                subject="Shoal: {{ flow_run.name }} {{ flow_run.state.name }}",
                body="{{ flow_run.state.message }}\nFlow run {{ flow_run.id }} of {{ flow.name }}.",
            )
        ],
    )


def troubles(block: Any) -> AutomationCore:
    """Tell people of reads that are quarantined, runs that take too long, workers that are set aside."""
    return AutomationCore(
        name=TROUBLED,
        description="Sends a message when a run quarantines reads, is later than estimated, or sets a worker aside.",
        trigger=EventTrigger(
            expect={QUARANTINED, LATE, ASIDE},
            match=ResourceSpecification({"prefect.resource.id": ["shoal.run.*"]}),
            posture=Posture.Reactive,
            threshold=1,
            within=timedelta(0),
        ),
        actions=[
            SendNotification(
                block_document_id=block,
                subject="Shoal: {{ event.resource.name }}: {{ event.payload.message }}",
                body="{{ event.resource['shoal.out'] }}",
            )
        ],
    )


def silences(block: Any, within: float) -> AutomationCore:
    """Tell people when no worker of a run gives a sign of life any more, and the run has not ended."""
    return AutomationCore(
        name=SILENT,
        description=f"Sends a message when no worker of a run has given a sign of life for {within:.0f} s.",
        trigger=EventTrigger(
            after={ALIVE},
            expect={ALIVE, ENDED},
            match=ResourceSpecification({"prefect.resource.id": ["shoal.run.*"]}),
            for_each={"prefect.resource.id", "shoal.out"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=within),
        ),
        actions=[
            SendNotification(
                block_document_id=block,
                subject="Shoal: no worker gives a sign of life",
                body=f"{{{{ labels.shoal.out }}}}: nothing for {within:.0f} s.",
            )
        ],
    )


def install_automations(notify: str | None = None, *, silent_after: float = SILENT_AFTER) -> tuple[str, ...]:
    """Make the automations, or bring them up to date; return their names.

    Args:
        notify: Notification block, as type/name (`slack-webhook/lab`); None: people look at the UI.
        silent_after: Seconds without a sign of life of any worker of a run, after which people are told.
    """
    automations = [zombies(), restarts()]
    if notify:
        block = _block_id(notify)
        automations += [failures(block), troubles(block), silences(block, silent_after)]
    with get_client(sync_client=True) as client:
        for automation in automations:
            there = [found.id for found in client.read_automations_by_name(automation.name)]
            if there:
                client.update_automation(there[0], automation)
            else:
                client.create_automation(automation)
            for other in there[1:]:
                client.delete_automation(other)
    return tuple(automation.name for automation in automations)


def crash_left_over() -> int:
    """End the flow runs, and their task runs, that a server shows as running though their worker is gone.

    Only for a server's one owner, before it starts a worker. Returns how many flow runs there were.
    """
    states = {"state": {"type": {"any_": [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]}}}
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(states))
        for run in runs:
            for task_run in client.read_task_runs(
                flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [run.id]}}),
                task_run_filter=TaskRunFilter.model_validate(states),
            ):
                client.set_task_run_state(task_run.id, Crashed(message="its worker is gone"), force=True)
            client.set_flow_run_state(run.id, Crashed(message="its worker is gone"), force=True)
    return len(runs)


def _block_id(notify: str) -> Any:
    block: Block = Block.load(notify)  # type: ignore[assignment]
    return block._block_document_id
