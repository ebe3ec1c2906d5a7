"""The flow `watch` with a deployment, on a real Prefect server; no worker: what becomes of a call is set by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry, Cancelled, Completed, Crashed, Failed

from flows import watch as watching
from flows.basecall import basecall_flow
from flows.watch import Watched, watch_flow
from tasks.core.errors import SettingsError
from tests.test_watch import NOW, Site


@pytest.fixture
def deployment(prefect_url: str, tmp_path: Path) -> Iterator[str]:
    """A deployment that no worker serves."""
    made = basecall_flow.to_deployment(name=tmp_path.name).apply()
    yield f"basecall/{tmp_path.name}"
    with get_client(sync_client=True) as client:
        client.delete_deployment(made)


def asked(site: Site) -> list[FlowRun]:
    """List the flow runs that looks at a site have started, the first one first."""
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate({"tags": {"all_": ["watch"]}}))
    found = [run for run in runs if str(run.parameters["out"]).startswith(str(site.out))]
    return sorted(found, key=lambda run: str(run.created))


def becomes(run: FlowRun, state: State, *, force: bool = True) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, state, force=force)


def look(site: Site) -> Watched:
    watched: Watched = watch_flow(**dict(site.settings))
    return watched


@pytest.mark.parametrize("ended", [Completed(), Failed(), Crashed()], ids=lambda state: str(state.name))
def test_a_call_that_ended_without_a_result_is_started_again(deployment: str, tmp_path: Path, ended: State) -> None:
    site = Site(tmp_path, deployment=deployment)
    site.write("run/a.pod5", at=NOW - 1e9)
    out = (str(site.out / "run"),)
    assert look(site).started == out
    assert look(site).started == ()  # it is under way
    (first,) = asked(site)
    becomes(first, ended)
    assert look(site).failed == out
    assert look(site).started == out
    assert len(asked(site)) == 2


def test_a_call_that_was_cancelled_is_left_alone_until_new_files_come(
    deployment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(tmp_path, deployment=deployment)
    site.write("run/a.pod5", at=NOW - 1e9)
    out = (str(site.out / "run"),)
    look(site)
    (first,) = asked(site)
    becomes(first, Cancelled())
    for _ in range(site.settings.attempts + 1):
        watched = look(site)
        assert (watched.cancelled, watched.started, watched.failed) == (out, (), ())
    assert "was cancelled and is not started again until new files come" in caplog.text
    becomes(first, AwaitingRetry(), force=False)  # as the message says
    assert look(site).cancelled == ()
    becomes(first, Cancelled())
    site.write("run/b.pod5", at=NOW - 1e9, first=3)
    assert look(site).started == out
    assert len(asked(site)) == 2


@pytest.mark.parametrize("name", ["local", "basecall/", "/local", "basecall/local/1"])
def test_a_deployment_is_named_with_its_flow(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match=f"deployment: '{name}' should be flow/deployment"):
        Site(tmp_path, deployment=name)


def test_a_deployment_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path)
    site.write("run/a.pod5", at=NOW)
    (seen,) = site.look(NOW + 20).calls
    assert seen.call
    monkeypatch.setattr(watching, "run_deployment", Mock(side_effect=ObjectNotFound(Exception("404"))))
    with pytest.raises(SettingsError, match=r"deployment: 'basecall/nope' is not on .*`shoal deploy`"):
        watching.ask("basecall/nope", seen.call)
