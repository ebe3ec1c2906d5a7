"""What Slurm says about a site's jobs before any is submitted, and orphans of an earlier flow."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from infra.site import Site, StageResources
from tasks.core.errors import SettingsError
from tasks.core.resources import format_walltime, parse_walltime

#: Seconds within which a command of Slurm's answers, or Slurm is away.
ANSWER_WITHIN = 60


def stages(site: Site) -> Iterator[tuple[str, StageResources]]:
    """Yield each kind of job of a site, with the table of the site file that describes it."""
    if site.launch is not None:
        yield "launch", site.launch
    for number, pool in enumerate(site.split.pools):
        yield f"split.pools.{number}", pool
    if not site.split.pools:
        yield "split", site.split
    if site.merge is not None:
        yield "merge", site.merge


def refusals(site: Site) -> list[str]:
    """Return one line for each kind of job that could never run, with Slurm's own reason.

    Raises:
        SettingsError: there is no Slurm here, or it does not answer.
    """
    if shutil.which("sbatch") is None:
        raise SettingsError(f'site {site.name}: kind = "slurm", but there is no sbatch here; run on a login node')
    refused = [(stage, _refusal(resources)) for stage, resources in stages(site)]
    return [f"site {site.name}, [{stage}]: {reason}" for stage, reason in refused if reason]


def _refusal(resources: StageResources) -> str:
    from infra.slurm import job_script  # not at the top: it changes signal handlers, which only a main thread may

    with TemporaryDirectory() as folder:
        script = Path(folder) / "job.sh"
        script.write_text(job_script(resources, run_id="shoal-test", slots=1, logs=Path(folder), scratch=None), "utf-8")
        done = _slurm(["sbatch", "--test-only", str(script)])
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("Try ")]
        errors = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in said if "error:" in line]
        return f"Slurm refuses it: {'; '.join(errors or said[-1:]) or f'sbatch ended with {done.returncode}'}"
    return _over_the_limit(resources)


def _over_the_limit(resources: StageResources) -> str:
    """Compare with the partition's limit: most Slurms take a job that is over it, and let it wait for ever."""
    chosen = [f"--partition={resources.partition}"] if resources.partition else []
    done = _slurm(["sinfo", "--noheader", "--format", "%P %l", *chosen])
    for line in done.stdout.splitlines():
        name, limit = line.split()
        if not resources.partition and not name.endswith("*"):
            continue
        try:
            seconds = parse_walltime(limit)
        except SettingsError:
            return ""  # infinite, or nothing we know
        if resources.walltime_seconds > seconds:
            return (
                f"a walltime of {resources.walltime} would wait for ever (PartitionTimeLimit): "
                f"partition {name.rstrip('*')} allows {format_walltime(seconds)}"
            )
    return ""


def cancel_orphans(run_id: str) -> int:
    """Cancel the jobs that a dead flow of this run has left; return how many. Only for the flow that owns the run."""
    listed = _slurm(["squeue", "--noheader", "--name", run_id, "--format", "%A"])
    if listed.returncode:
        raise SettingsError(f"squeue failed, is Slurm away? {listed.stderr.strip()}")
    jobs = listed.stdout.split()
    if jobs:
        _slurm(["scancel", *jobs])
    return len(jobs)


def _slurm(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_WITHIN, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SettingsError(f"{command[0]} does not answer: {error}") from error
