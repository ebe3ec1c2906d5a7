"""Put the deployments of prefect.yaml on a Prefect server, with a site's folders and schedule filled in."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from tasks.core.errors import SettingsError, ShoalError

FILE = Path(__file__).with_name("prefect.yaml")
WATCH = "every-5-minutes"
POOL = "shoal"


def filled_in(
    project: Mapping[str, Any],
    *,
    watch: Mapping[str, Any] | None,
    every: float | None,
    cron: str | None,
    site: str | None,
    kind: str = "local",
) -> dict[str, Any]:
    """Fill a site's choices into the project file's contents.

    Args:
        watch: Parameters of the watch; None leaves its schedules off.
        every: Seconds between looks.
        cron: Times of looks, instead of `every`.
        site: Site that calls, on the deployment of its kind, what events of sequencers ask for; None: this machine.
        kind: The site's: `local` or `slurm`.
        trigger: Keep the event trigger.
    """
    filled: dict[str, Any] = copy.deepcopy(dict(project))
    by_name = {deployment["name"]: deployment for deployment in filled["deployments"]}
    triggers = by_name["local"].pop("triggers")
    if site:
        by_name[kind]["parameters"]["site"] = site
        for trigger in triggers:
            trigger["parameters"]["site"] = site
    by_name[kind]["triggers"] = triggers
    for deployment in filled["deployments"]:
        if deployment["name"] != WATCH or watch is None:
            continue
        deployment["parameters"] = dict(watch)
        for schedule in deployment["schedules"]:
            if schedule["slug"] == "interval":
                schedule["active"] = cron is None
                schedule["interval"] = every if every is not None else schedule["interval"]
            elif cron is not None:
                schedule["active"] = True
                schedule["cron"] = cron
    return filled


def refuse_cron(cron: str) -> None:
    """Refuse times of looks that Prefect would. It reads the environment here: that must be what it is to be.

    Raises:
        SettingsError: they are none.
    """
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=cron)
    except ValueError as error:
        raise SettingsError(f"cron: {cron!r} is no schedule; give for example --cron '*/5 * * * *'") from error


def install(
    *, watch: Mapping[str, Any] | None, every: float | None, cron: str | None, site: str | None, kind: str
) -> tuple[str, ...]:
    """Make work pool and deployments, or bring them up to date; return the names of the deployments.

    The arguments are those of `filled_in`.

    Raises:
        SettingsError: no Prefect API is configured.
        ShoalError: Prefect refuses; its words are in the message.
    """
    if "PREFECT_API_URL" not in os.environ:
        raise SettingsError("PREFECT_API_URL names no Prefect server; name yours, or let `shoal serve` start one")
    project = filled_in(
        yaml.safe_load(FILE.read_text("utf-8")), watch=watch, every=every, cron=cron, site=site, kind=kind
    )
    _prefect("work-pool", "create", POOL, "--type", "process", "--overwrite")
    with TemporaryDirectory() as folder:
        file = Path(folder, "prefect.yaml")
        file.write_text(yaml.safe_dump(project, sort_keys=False), "utf-8")
        _prefect("--no-prompt", "deploy", "--prefect-file", str(file), "--all")
    flows = {"flows.basecall.basecall_flow": "basecall", "flows.watch.watch_flow": "watch"}
    return tuple(f"{flows[deployment['entrypoint']]}/{deployment['name']}" for deployment in project["deployments"])


def _prefect(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        words = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise ShoalError(f"`prefect {' '.join(arguments)}` failed:\n{words}")
    return done.stdout
