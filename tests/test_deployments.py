"""The deployments on a real server, with a real work pool and worker, by the commands of the README."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import psutil
import pytest
import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.context import refresh_global_settings_context
from prefect.events import emit_event

from deployments.automations import install_automations
from deployments.install import FILE, filled_in
from flows.basecall import basecall_flow
from flows.telling import ALIVE, tell
from flows.watch import watch_flow
from infra.prefect_server import prefect_api
from infra.processes import end, spawn
from tasks.formats.commit import committed_ids
from tasks.formats.workspace import Workspace
from tasks.watch_settings import resolve_watch
from tests.making import damage_signal, write_pod5
from tests.servers import http_post, postgres, started_by, wait_until, webhook
from tests.slurm import SITE
from tests.test_readme import BLOCKS, LINES

BIN = Path(sys.executable).parent


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the README."""
    values = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **environment}
    return subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=values, timeout=600)


def readme(beginning: str) -> str:
    (line,) = (line for line in LINES if line.startswith(beginning))
    return line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployed")
    write_pod5(folder / "data" / "run" / "0.pod5", [20_000] * 6)
    return folder


@pytest.fixture(scope="module")
def prefect_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server on PostgreSQL: automations and deployments write much at once, and SQLite's writers wait a minute."""
    home = tmp_path_factory.mktemp("prefect_on_postgres")
    with postgres() as database, pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        patch.setenv("PREFECT_HOME", str(home))
        patch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", database.replace("postgresql:", "postgresql+asyncpg:"))
        with prefect_api(log_folder=home, announce=lambda _: None) as url:
            yield url
    refresh_global_settings_context()  # back to the session's server


@pytest.fixture(scope="module")
def worker(folder: Path, prefect_url: str) -> Iterator[psutil.Process]:
    """Deploy and start a worker, as the README says. Its watch may look too: it calls into a folder of its own."""
    command = readme("shoal deploy").replace("/data", f"{folder}/data").replace("/calls", f"{folder}/calls")
    deployed = shell(command.replace(" --site site.toml", ""))
    assert deployed.returncode == 0, deployed.stderr
    assert "watch/every-5-minutes" in deployed.stderr
    process = spawn(
        [sys.executable, "-m", *shlex.split(readme("prefect worker"))],
        log=folder / "worker.log",
        environment={**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "2"},
    )
    yield psutil.Process(process.pid)
    end(process, grace=60)


def flow_runs(url: str, **filters: Any) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = http_post(f"{url}/flow_runs/filter", json=filters).json()
    return runs


@pytest.mark.deployment
def test_the_readme_runs_a_deployment(worker: psutil.Process, folder: Path, prefect_url: str) -> None:
    command = readme("prefect deployment run").replace("/data", f"{folder}/data").replace("/calls", f"{folder}/calls")
    done = shell(command.replace("slurm", "local") + """ -p 'engine={"kind": "null"}'""")
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "worker.log").read_text()
    assert "Completed" in done.stdout
    ledger = pl.read_parquet(folder / "calls" / "by-hand" / "ledger.parquet")
    assert set(ledger["fate"]) == {"called"}
    assert ledger.height == 6
    (run,) = flow_runs(prefect_url, deployments={"name": {"any_": ["local"]}})
    assert run["name"].startswith("FAX12345 sample")
    assert {"engine:null", "site:local", "FAX12345"} <= set(run["tags"])


@pytest.mark.deployment
@pytest.mark.slurm
def test_a_deployment_calls_on_slurm(worker: psutil.Process, folder: Path, slurm_here: None, prefect_url: str) -> None:
    out = folder / "calls" / "on-slurm"
    command = readme("prefect deployment run").replace("/data", f"{folder}/data").replace("/calls/by-hand", str(out))
    variables = json.dumps({"SLURM_CONF": os.environ["SLURM_CONF"], "PYTHONPATH": os.environ["PYTHONPATH"]})
    engine = """-p 'engine={"kind": "null"}'"""
    done = shell(f"{command} {engine} -p site={SITE} -jv 'env={variables}'")
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "worker.log").read_text()
    assert set(pl.read_parquet(out / "ledger.parquet")["fate"]) == {"called"}
    (run,) = flow_runs(prefect_url, deployments={"name": {"any_": ["slurm"]}})
    assert "site:testbed" in run["tags"]


@pytest.mark.deployment
def test_an_event_of_the_sequencer_starts_a_run(worker: psutil.Process, folder: Path, prefect_url: str) -> None:
    out = folder / "calls" / "by-event"
    emit_event(
        "sequencer.run.finished",
        resource={"prefect.resource.id": "sequencer.run.1"},
        payload={"folder": str(folder / "data" / "run"), "out": str(out)},
    )
    wait_until(lambda: (out / "ledger.parquet").exists(), seconds=600, telling=(folder / "worker.log").read_text)


@pytest.mark.deployment
@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"input": [], "out": "/tmp/x"}, "'input'"),
        ({"input": ["/tmp"]}, "'out' is a required property"),
        ({"input": ["/tmp"], "out": "/tmp/x", "batch_samples": 5}, "'batch_samples'"),
        ({"input": ["/tmp"], "out": "/tmp/x", "engine": {"speed": 5}}, "'speed'"),
    ],
)
def test_wrong_parameters_are_refused_before_the_run(
    worker: psutil.Process, prefect_url: str, parameters: dict[str, Any], words: str
) -> None:
    refused = create_flow_run(prefect_url, parameters)
    assert refused.status_code == 409
    assert words in refused.json()["detail"]


@pytest.mark.deployment
def test_wrong_parameters_are_refused_on_the_command_line(worker: psutil.Process) -> None:
    given = """-p 'input=["/tmp"]' -p out=/tmp/x -p 'engine={"kind": "gpu"}'"""
    done = shell(f"prefect deployment run basecall/local {given}", COLUMNS="1000")
    assert done.returncode != 0
    assert "'engine.kind'" in re.sub(r"\s+", " ", done.stdout + done.stderr)


def create_flow_run(url: str, parameters: dict[str, Any]) -> httpx.Response:
    """Ask the server for a run of the deployment that calls here."""
    deployment = http_post(f"{url}/deployments/filter", json={"deployments": {"name": {"any_": ["local"]}}}).json()
    return http_post(f"{url}/deployments/{deployment[0]['id']}/create_flow_run", json={"parameters": parameters})


@pytest.mark.deployment
def test_people_are_told_when_it_matters(
    worker: psutil.Process, folder: Path, prefect_url: str, tmp_path: Path
) -> None:
    """Of a flow that is killed, which is started again; of a read that is quarantined; of workers that fall silent."""
    damage_signal(write_pod5(tmp_path / "data" / "damaged.pod5", [3_000] * 100, seed=2))
    write_pod5(tmp_path / "data" / "whole.pod5", [3_000] * 200, seed=3)
    out = tmp_path / "out"
    silent = Workspace(tmp_path / "silent")
    silent.create()
    with webhook() as (url, bodies):

        def told(words: str) -> None:
            log = (folder / "worker.log").read_text
            wait_until(lambda: any(words in body for body in bodies), seconds=600, telling=lambda: f"{bodies} {log()}")

        CustomWebhookNotificationBlock(name="told", url=url, json_data={"text": "{{subject}} {{body}}"}).save(
            "told", overwrite=True
        )
        installed = install_automations("custom-webhook/told", silent_after=30)
        assert install_automations("custom-webhook/told", silent_after=30) == installed
        named = [one["name"] for one in http_post(f"{prefect_url}/automations/filter", json={}).json()]
        assert all(named.count(name) == 1 for name in installed)
        slow = {"batch_samples": 100_000, "engine": {"kind": "null", "rate": 10_000}}
        asked = create_flow_run(prefect_url, {"input": [str(tmp_path / "data")], "out": str(out), **slow})
        assert asked.status_code == 201, asked.text
        flow_run = asked.json()["id"]
        tell(silent, ALIVE, "the only sign of life")
        wait_until(lambda: bool(committed_ids(Workspace(out))), seconds=600, telling=(folder / "worker.log").read_text)
        process_of(worker, flow_run).kill()
        before = len(committed_ids(Workspace(out)))
        told("Crashed")
        told(f"no worker gives a sign of life {silent.out}: nothing for 30 s")
        told("1 of 300 reads are quarantined")
    assert before < len(committed_ids(Workspace(out)))


def process_of(worker: psutil.Process, flow_run: str) -> psutil.Process:
    """Find the process of a flow run: the worker has other runs beside it, and it has children of its own."""
    for child in started_by(worker.pid, "prefect"):
        with suppress(psutil.Error):  # it has ended
            if child.environ().get("PREFECT__FLOW_RUN_ID") == flow_run:
                return child
    raise AssertionError(f"flow run {flow_run} has no process")


def test_the_watch_settings_of_the_readme_are_known(tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if "[[rules]]" in block)
    file = tmp_path / "watch.toml"
    file.write_text("\n".join(line.removeprefix("    ") for line in block.splitlines()))
    settings = resolve_watch(file=file, command_line={"folders": [tmp_path], "out": tmp_path / "calls"})
    chosen = settings.for_run({"kit": "SQK-LSK114", "sample": "rush-1"}, input=(tmp_path,), out=tmp_path / "out")
    assert chosen.output.min_qscore == 12
    assert settings.stop_rules.reads == 4_000_000


def test_parameters_are_the_settings() -> None:
    for flow in (basecall_flow, watch_flow):
        schema = flow.parameters.model_dump()
        for name, field in schema["properties"].items():
            assert field.get("title", name) != name, f"{name} has no title"
    shown = basecall_flow.parameters.properties
    assert shown["batch_samples"]["minimum"] == 100_000
    assert "cpu" in basecall_flow.parameters.definitions["EngineSettings"]["properties"]["kind"]["enum"]


def test_the_site_is_filled_into_the_deployments() -> None:
    project = yaml.safe_load(FILE.read_text())
    off = filled_in(project, watch=None, every=None, cron=None, site=None)
    assert off == project
    on = filled_in(project, watch={"folders": ["/data"]}, every=60.0, cron=None, site="here.toml")
    (watch,) = (one for one in on["deployments"] if one["name"] == "every-5-minutes")
    assert [(one.get("interval"), one["active"]) for one in watch["schedules"]] == [(60.0, True), (None, False)]
    local, slurm = on["deployments"][:2]
    assert local["parameters"]["site"] == local["triggers"][0]["parameters"]["site"] == "here.toml"
    assert slurm["parameters"]["site"] == "slurm"
    cluster = filled_in(project, watch=None, every=None, cron=None, site="there.toml", kind="slurm")
    local, slurm = cluster["deployments"][:2]
    assert local["parameters"]["site"] == "local"
    assert slurm["parameters"]["site"] == slurm["triggers"][0]["parameters"]["site"] == "there.toml"
    assert "triggers" not in local
    cron = filled_in(project, watch={"folders": ["/data"]}, every=None, cron="0 6 * * *", site=None)
    (watch,) = (one for one in cron["deployments"] if one["name"] == "every-5-minutes")
    assert [(one.get("cron"), one["active"]) for one in watch["schedules"]] == [(None, False), ("0 6 * * *", True)]
