"""What a run tells by Prefect's events: signs of life of its workers, and what people want to hear of.

Events may be lost: they are for telling people, and nothing of the run depends on them.
"""

from __future__ import annotations

from prefect.events import emit_event

from tasks.formats.workspace import Workspace, run_id_of

#: Names of the events; deployments/automations.py acts on them.
ALIVE = "shoal.run.alive"
ENDED = "shoal.run.ended"
LATE = "shoal.run.late"
QUARANTINED = "shoal.run.quarantined"
ASIDE = "shoal.run.worker-set-aside"
#: A run is late when it takes so many times its estimate, and so many seconds more: workers need time to come up.
LATE_FACTOR = 1.5
LATE_SLACK = 600.0


def tell(workspace: Workspace, event: str, message: str, **figures: float) -> None:
    """Send an event of a run.

    Args:
        figures: Numbers that automations may look at.
    """
    emit_event(
        event,
        resource={
            "prefect.resource.id": f"shoal.run.{run_id_of(workspace)}",
            "prefect.resource.name": workspace.out.name,
            "shoal.out": str(workspace.out),
        },
        payload={"message": message, **figures},
    )


def is_late(seconds: float, estimate: float) -> bool:
    """Tell whether a run has taken too long. Both in seconds; an estimate of 0 is none."""
    return estimate > 0 and seconds > LATE_FACTOR * estimate + LATE_SLACK
