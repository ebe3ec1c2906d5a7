"""The command `shoal`.

Exit status: 0 complete; 2 wrong settings, or a file that can't be read or written; 3 complete, but some input was
skipped or quarantined; 4 incomplete.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, Parameter
from cyclopts.types import ResolvedPath
from cyclopts.validators import Number

from deployments.display import Display
from infra.confines import confine, umask_of
from infra.lock import alone
from infra.prefect_server import prefect_api
from infra.preflight import examine, refuse_site
from infra.site import address_of, load_site
from tasks.core.errors import InputError, SettingsError, ShoalError, StoppedError
from tasks.core.plan import PlannedFile
from tasks.core.result import MergedRun
from tasks.core.watching import parse_duration
from tasks.engines.catalogue import list_models
from tasks.engines.registry import slots_of
from tasks.formats.commit import committed_ids
from tasks.formats.planfile import plan_digest, read_plan
from tasks.formats.replay import ReplaySettings, bundled_source, replay
from tasks.formats.resort import Choice, choose, is_barcoded, read_choice
from tasks.formats.samplesheet import SampleSheet, read_sample_sheet
from tasks.formats.workspace import Workspace, read_json
from tasks.launch import bundles_left, estimated_seconds, plan_input, refuse_flaws
from tasks.merge import merge as merge_results
from tasks.merge import merged_before, merged_by
from tasks.progress import Watch
from tasks.settings import (
    LOG_LEVELS,
    EngineSettings,
    OutputSettings,
    RunSettings,
    checked,
    resolve_settings,
    whole_path,
)
from tasks.verify import verify as verify_results
from tasks.watch import STATE as WATCH_STATE
from tasks.watch_settings import WatchSettings, resolve_watch

app = App(
    name="shoal",
    help="Basecall nanopore runs on whatever GPUs a site has, with a ledger in which every read has one fate.",
    version=lambda: version("shoal"),
    version_flags=["--version"],
)


class Exit(IntEnum):
    """What the exit status tells."""

    COMPLETE = 0
    WRONG_SETTINGS = 2
    FLAWED = 3
    INCOMPLETE = 4


def main() -> NoReturn:
    """Run the command line; errors of Shoal's own come out as one clear message on standard error."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: a sign that it lacks ends no command
    display = Display(json=False)
    try:
        _log()
        status = app(sys.argv[1:], exit_on_error=False, result_action="return_value")
    except (CycloptsError, SettingsError, InputError) as error:
        if not isinstance(error, CycloptsError):  # those are shown already
            display.complain(str(error))
        sys.exit(Exit.WRONG_SETTINGS)
    except ShoalError as error:
        display.complain(str(error))
        sys.exit(Exit.INCOMPLETE)
    except OSError as error:
        named = error.filename or ("standard output" if _output_is_lost() else None)
        if named is None:  # it would tell people nothing
            raise
        logging.getLogger(__name__).debug("where it came from", exc_info=True)
        display.complain(f"{named}: {error.strerror}")
        sys.exit(Exit.WRONG_SETTINGS)
    sys.exit(status or Exit.COMPLETE)


def _output_is_lost() -> bool:
    """Tell whether what is printed can't be written, e.g. to a full disk; then drop it, for Python would try again."""
    try:
        print(flush=True)  # an unbuffered one forgets that it has failed
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return True
    return False


def _log() -> None:
    """Log on standard error what is as grave as SHOAL_LOG_LEVEL says."""
    given = os.environ.get("SHOAL_LOG_LEVEL") or "WARNING"
    level = given.upper()
    if level not in LOG_LEVELS:
        raise SettingsError(f"SHOAL_LOG_LEVEL: {given!r} is no level; give {', '.join(LOG_LEVELS)}")
    handler = logging.StreamHandler()
    handler.setLevel(level)  # the handler's, not a logger's: Prefect and Dask turn their own loggers up
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", handlers=[handler])
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", level)


def _from(model: type[Any], field: str) -> Parameter:
    """Take an option's help from the settings field behind it: that is where it is documented."""
    info = model.model_fields[field]
    default = "" if info.is_required() or info.default is None else f" [default: {info.default}]"
    return Parameter(help=f"{info.title}{': ' + info.description if info.description else ''}.{default}")


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What `run` and `plan` take. What is not given is left to the settings file, the environment, the defaults."""

    out: Annotated[Path | None, _from(RunSettings, "out"), Parameter(alias="-o")] = None
    site: Annotated[str | None, _from(RunSettings, "site")] = None
    engine: Annotated[str | None, _from(EngineSettings, "kind")] = None
    model: Annotated[str | None, _from(EngineSettings, "model")] = None
    threads: Annotated[int | None, _from(EngineSettings, "threads")] = None
    chemistry: Annotated[str | None, _from(EngineSettings, "chemistry")] = None
    int8: Annotated[bool | None, _from(EngineSettings, "int8")] = None
    rate: Annotated[float | None, _from(EngineSettings, "rate")] = None
    in_flight_samples: Annotated[int | None, _from(EngineSettings, "in_flight_samples")] = None
    modified_bases: Annotated[str | None, _from(EngineSettings, "modified_bases")] = None
    moves: Annotated[bool | None, _from(EngineSettings, "moves")] = None
    trim: Annotated[str | None, _from(EngineSettings, "trim")] = None
    barcode_kits: Annotated[str | None, _from(EngineSettings, "barcode_kits")] = None
    barcodes: Annotated[str | None, _from(EngineSettings, "barcodes")] = None
    barcode_both_ends: Annotated[bool | None, _from(EngineSettings, "barcode_both_ends")] = None
    barcode_trim: Annotated[bool | None, _from(EngineSettings, "barcode_trim")] = None
    poly_a: Annotated[bool | None, _from(EngineSettings, "poly_a")] = None
    poly_a_config: Annotated[Path | None, _from(EngineSettings, "poly_a_config")] = None
    bed: Annotated[Path | None, _from(EngineSettings, "bed")] = None
    duplex: Annotated[bool | None, _from(EngineSettings, "duplex")] = None
    min_qscore: Annotated[float | None, _from(OutputSettings, "min_qscore")] = None
    headers: Annotated[str | None, _from(OutputSettings, "headers")] = None
    summary: Annotated[str | None, _from(OutputSettings, "summary")] = None
    files: Annotated[str | None, _from(OutputSettings, "files")] = None
    formats: Annotated[str | None, _from(OutputSettings, "formats")] = None
    reference: Annotated[Path | None, _from(OutputSettings, "reference")] = None
    sample_sheet: Annotated[Path | None, _from(OutputSettings, "sample_sheet")] = None
    barcoding_summary: Annotated[bool | None, _from(OutputSettings, "barcoding_summary")] = None
    rna_as_dna: Annotated[bool | None, _from(OutputSettings, "rna_as_dna")] = None
    batch_samples: Annotated[int | None, _from(RunSettings, "batch_samples")] = None
    bundle_samples: Annotated[int | None, _from(RunSettings, "bundle_samples")] = None
    rounds: Annotated[int | None, _from(RunSettings, "rounds")] = None
    strict: Annotated[bool | None, _from(RunSettings, "strict")] = None
    accept_missing: Annotated[bool | None, _from(RunSettings, "accept_missing")] = None
    log_level: Annotated[str | None, _from(RunSettings, "log_level")] = None
    settings: Annotated[Path | None, Parameter(help="Settings file (TOML); the command line wins over it.")] = None

    def resolve(self, inputs: tuple[Path, ...], *, out: Path | None = None) -> RunSettings:
        """Merge with settings file and environment, and check.

        Args:
            out: Output folder where nothing names one.
        """

        def given(model: type[Any], *, but: tuple[str, ...] = (), **renamed: str) -> dict[str, Any]:
            options = {field: renamed.get(field, field) for field in model.model_fields if field not in but}
            return {field: getattr(self, name) for field, name in options.items() if getattr(self, name) is not None}

        return resolve_settings(
            defaults={"out": out} if out else {},
            file=self.settings,
            environment=os.environ,
            command_line={
                **({"input": inputs} if inputs else {}),
                **given(RunSettings, but=("input", "engine", "output")),
                "engine": given(EngineSettings, kind="engine"),
                "output": given(OutputSettings),
            },
        )


Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON object on standard output.")]
RunFolder = Annotated[ResolvedPath, Parameter(help="A run's output folder.")]


a_port = Number(gte=1, lte=65535)
MetricsPort = Annotated[
    int | None,
    Parameter(help="Port on loopback for Prometheus to read figures from; none: none.", validator=a_port),
]


@app.command
def run(
    *input: Path,  # noqa: A002
    options: RunOptions = RunOptions(),
    metrics_port: MetricsPort = None,
    json: Json = False,
) -> int:
    """Call every read of the input once; the same command again goes on where an earlier one stopped.

    Parameters
    ----------
    input
        Folders (searched for *.pod5, recursively) and POD5 files.
    """
    return _run(options.resolve(input), Display(json=json), metrics_port=metrics_port)


@app.command
def plan(*input: Path, options: RunOptions = RunOptions(), json: Json = False) -> int:  # noqa: A002
    """Say what `run` would do, and write nothing: files, reads, batches, bundles, estimated time and disk.

    Parameters
    ----------
    input
        Folders (searched for *.pod5, recursively) and POD5 files.
    """
    with TemporaryDirectory() as nowhere:
        settings = options.resolve(input, out=Path(nowhere))
        launched = plan_input(settings)
    if settings.strict:
        refuse_flaws(launched.plan)
    slots = load_site(settings.site).slots_in_all(slots_of(settings.engine))
    left = launched.left
    samples = sum(batch.samples for batch in left)
    reads = sum(batch.reads for batch in left)
    Display(json=json).plan(
        launched.plan,
        {
            "files": len(launched.plan.files),
            "reads": len(launched.reads.read_ids),
            "samples": int(launched.reads.num_samples.sum()),
            "batches": len(launched.plan.batches),
            "batches_left": len(left),
            "bundles": len(bundles_left(left, settings, slots=slots, round_=0, first=0)),
            "estimated_seconds": round(estimated_seconds(left, settings, slots=slots)),
            # 12.5 samples per base, two bytes per base, BGZF to 0.54 of that; some 300 bytes of tables per read.
            "estimated_bytes": round(samples / 12.5 * 2 * 0.54 + 300 * reads),
        },
    )
    return Exit.COMPLETE


@app.command
def status(
    folder: RunFolder,
    /,
    *,
    watch: bool = False,
    metrics: bool = False,
    json: Json = False,
) -> int:
    """Say how far a run is, from its folder alone.

    Parameters
    ----------
    watch
        Go on showing it, with its workers, until it is called and merged; Ctrl-C ends that, not the run.
    metrics
        Show where the time went, stage by stage.
    """
    workspace = _existing(folder)
    display = Display(json=json)
    watching = Watch(workspace)
    if watch:
        with _stoppable_event() as stop:
            display.follow(workspace, watching, stop, done=lambda: merged_before(workspace) is not None)
    progress = watching.look()
    if progress is None:
        raise SettingsError(f"{folder} holds no plan yet; `shoal run INPUT --out {folder}` makes one")
    merged = merged_before(workspace)
    display.status(progress, merged, metrics=metrics)
    return _verdict(merged) if merged else Exit.INCOMPLETE


@app.command
def merge(
    folder: RunFolder,
    /,
    *,
    files: Annotated[str | None, _from(OutputSettings, "files")] = None,
    summary: Annotated[str | None, _from(OutputSettings, "summary")] = None,
    formats: Annotated[str | None, _from(OutputSettings, "formats")] = None,
    reference: Annotated[Path | None, _from(OutputSettings, "reference")] = None,
    barcoding_summary: Annotated[bool | None, _from(OutputSettings, "barcoding_summary")] = None,
    json: Json = False,
) -> int:
    """Write the result of a finished run again, with another choice of files, formats or columns; calls nothing."""
    workspace = _existing(folder)
    changed = {
        "files": files,
        "summary": summary,
        "formats": formats,
        "reference": reference,
        "barcoding_summary": barcoding_summary,
    }
    settings, called = _stored(workspace, changed), _stored(workspace)
    if missing := set(settings.output.staged) - set(called.output.staged):
        raise SettingsError(
            f"output.formats: {folder} was called with {','.join(called.output.formats)}, and {missing.pop()} can't be "
            "made of that; call it into another folder with the formats that are wanted"
        )
    return _merge_again(workspace, settings, Display(json=json))


@app.command
def resplit(
    folder: RunFolder,
    /,
    *,
    min_qscore: Annotated[float, Parameter(help="Mean qscore from which a read passes, Phred.")],
    json: Json = False,
) -> int:
    """Sort the calls of a finished run into pass and fail by another mean qscore; calls nothing."""
    workspace = _existing(folder)
    settings = _stored(workspace, {"min_qscore": min_qscore})
    return _sort_again(workspace, settings, min_qscore=min_qscore, display=Display(json=json))


@app.command
def demux(
    folder: RunFolder,
    /,
    *,
    sample_sheet: Annotated[Path, Parameter(help="MinKNOW's CSV; gives barcodes their aliases.")],
    json: Json = False,
) -> int:
    """Sort the calls of a finished run, barcoded when they were called, by another sample sheet; calls nothing."""
    workspace = _existing(folder)
    sheet = read_sample_sheet(sample_sheet)
    plan = read_plan(workspace)
    if not any(row.of(run.info) for row in sheet.rows for run in plan.runs):
        cells = ", ".join(sorted({run.info.flow_cell_id or "unknown" for run in plan.runs}))
        raise SettingsError(f"{sample_sheet}: no row is of a run in {folder}; its flow cells are {cells}")
    if committed_ids(workspace) and not is_barcoded(workspace):
        raise SettingsError(
            f"{folder} was not barcoded when it was called, and a sample sheet names barcodes; call it into another "
            "folder with --barcode-kits"
        )
    return _sort_again(workspace, _stored(workspace), sheet=sheet, display=Display(json=json))


@app.command
def verify(folder: RunFolder, /, *, json: Json = False) -> int:
    """Check a finished run folder: every value, every checksum; ledger, FASTQ and summary name the same reads."""
    report = verify_results(_existing(folder))
    Display(json=json).verified(report)
    return Exit.INCOMPLETE if report.faults else Exit.COMPLETE


@app.command
def doctor(
    *,
    site: str = "local",
    engine: str = "cpu",
    model: Annotated[str | None, _from(EngineSettings, "model")] = None,
    json: Json = False,
) -> int:
    """Look at this installation, the site and the engine, and say what would keep a run from working."""
    settings: EngineSettings = checked(EngineSettings, {"kind": engine, "model": model})
    findings = examine(load_site(site), settings)
    Display(json=json).findings(findings)
    return Exit.WRONG_SETTINGS if any(finding.fatal for finding in findings) else Exit.COMPLETE


@app.command
def models(*folders: Path, json: Json = False) -> int:
    """List the embedded engine's models: chemistry, size, digest, and what may be expected of their calls.

    Parameters
    ----------
    folders
        Folders to look for model directories in, besides the bundled models.
    """
    Display(json=json).models(list_models(folders))
    return Exit.COMPLETE


@app.command
def watch(
    *folders: Path,
    out: Annotated[Path | None, _from(WatchSettings, "out"), Parameter(alias="-o")] = None,
    every: Annotated[str, Parameter(help="Time from one look to the next, e.g. 30s, 5m, 1h.")] = "5m",
    once: Annotated[bool, Parameter(negative="", help="Look once, and end.")] = False,
    live: Annotated[bool | None, _from(WatchSettings, "live")] = None,
    settled_for: Annotated[str | None, Parameter(help="Size and time of a file must not have changed for.")] = None,
    idle_after: Annotated[str | None, Parameter(help="A run is over when nothing came for.")] = None,
    site: Annotated[str | None, _from(WatchSettings, "site")] = None,
    engine: Annotated[str | None, _from(EngineSettings, "kind")] = None,
    model: Annotated[str | None, _from(EngineSettings, "model")] = None,
    batch_samples: Annotated[int | None, _from(WatchSettings, "batch_samples")] = None,
    settings: Annotated[Path | None, Parameter(help="Watch settings (TOML): rules, stop rules, …")] = None,
    json: Json = False,
) -> int:
    """Watch folders that sequencers write into, and call what is new; goes on until it is stopped.

    Parameters
    ----------
    folders
        Folders to look in: MinKNOW's tree, or any folder of POD5 files.
    """
    display = Display(json=json)
    given = {
        "folders": folders or None,
        "out": out,
        "live": live,
        "settled_for": parse_duration(settled_for, zero=True) if settled_for else None,
        "idle_after": parse_duration(idle_after) if idle_after else None,
        "site": site,
        "batch_samples": batch_samples,
    }
    engine_given = {"kind": engine, "model": model}
    resolved = resolve_watch(
        file=settings,
        command_line={
            **{key: value for key, value in given.items() if value is not None},
            "engine": {key: value for key, value in engine_given.items() if value is not None},
        },
    )
    confine(resolved)
    interval = parse_duration(every)
    state = resolved.out / WATCH_STATE
    pause = threading.Event()
    place = load_site(resolved.site)
    with _stoppable(), umask_of(place):
        state.mkdir(parents=True, exist_ok=True)
        with (
            alone(state / "watch.lock", announce=display.say),
            prefect_api(log_folder=state, announce=display.say, host=address_of(place)),
        ):
            from flows.watch import watch_flow  # see _import_flow

            while True:
                began = time.monotonic()
                watched = watch_flow(**dict(resolved))
                display.watched(watched.look, failed=watched.failed, cancelled=watched.cancelled)
                if once:
                    if watched.failed or watched.cancelled:
                        return Exit.INCOMPLETE
                    return Exit.FLAWED if watched.look.problems else Exit.COMPLETE
                pause.wait(max(0.0, interval - (time.monotonic() - began)))


@app.command
def deploy(
    *folders: Path,
    out: Annotated[Path | None, _from(WatchSettings, "out"), Parameter(alias="-o")] = None,
    every: Annotated[str, Parameter(help="Time from one look to the next, e.g. 30s, 5m, 1h.")] = "5m",
    cron: Annotated[str | None, Parameter(help="Times of looks, as cron has them; instead of --every.")] = None,
    site: Annotated[str | None, _from(RunSettings, "site")] = None,
    settings: Annotated[Path | None, Parameter(help="Watch settings (TOML): rules, stop rules, …")] = None,
    notify: Annotated[
        str | None, Parameter(help="Notification block told of failures, e.g. slack-webhook/lab.")
    ] = None,
) -> int:
    """Put the deployments on the Prefect server that PREFECT_API_URL names; again, to change them.

    Parameters
    ----------
    folders
        Folders to watch; none: the watch's schedule stays off.
    """
    display = Display(json=False)
    from deployments.install import install, refuse_cron

    schedule = _schedule(folders, out, every=every, cron=cron, site=site, file=settings)
    if cron is not None:
        refuse_cron(cron)
    names = install(**schedule)
    from deployments.automations import install_automations

    for name in (*names, *install_automations(notify)):
        display.say(name)
    display.say("a worker runs them, on the machine that is to call: prefect worker start --pool shoal")
    return Exit.COMPLETE


@app.command
def serve(
    *folders: Path,
    out: Annotated[Path | None, _from(WatchSettings, "out"), Parameter(alias="-o")] = None,
    every: Annotated[str, Parameter(help="Time from one look to the next, e.g. 30s, 5m, 1h.")] = "5m",
    cron: Annotated[str | None, Parameter(help="Times of looks, as cron has them; instead of --every.")] = None,
    site: Annotated[str | None, _from(RunSettings, "site")] = None,
    settings: Annotated[Path | None, Parameter(help="Watch settings (TOML): rules, stop rules, …")] = None,
    notify: Annotated[
        str | None, Parameter(help="Notification block told of failures, e.g. slack-webhook/lab.")
    ] = None,
    host: Annotated[str, Parameter(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="Port of API and UI.", validator=a_port)] = 4200,
    home: Annotated[Path, Parameter(help="Folder for database, password and logs.")] = Path("~/.shoal"),
    database: Annotated[
        str | None,
        Parameter(help="postgresql://user:password@host/name; none: SQLite.", env_var="SHOAL_DATABASE"),
    ] = None,
    auth: Annotated[bool, Parameter(help="Ask for a password.")] = True,
    metrics_port: MetricsPort = None,
) -> int:
    """Run all that a workstation needs until it is stopped: Prefect server with UI, worker, deployments, watch.

    Parameters
    ----------
    folders
        Folders to watch; none: the watch's schedule stays off.
    """
    from deployments.install import refuse_cron
    from deployments.serve import Home, environment, password
    from deployments.serve import serve as serve_

    display = Display(json=False)
    place = Home(folder=home.expanduser().absolute())
    place.create()
    schedule = _schedule(folders, out, every=every, cron=cron, site=site, file=settings)
    word = password(place.auth) if auth else None
    values = environment(place, host=host, port=port, database=database, auth=word, site=schedule["site"])

    def prepare() -> None:
        from deployments.automations import crash_left_over, install_automations
        from deployments.install import install

        left = crash_left_over()
        if left:
            display.say(f"{left} flow runs were cut off when this was last stopped; the next look goes on with them")
        for name in (*install(**schedule), *install_automations(notify)):
            display.say(f"deployed: {name}")
        display.say(f"ready: {values['PREFECT_API_URL'].removesuffix('/api')}")

    with (
        alone(place.lock, announce=display.say),
        _stoppable_event() as stop,
        _metrics(metrics_port, watch_out=Path(schedule["watch"]["out"]) if schedule["watch"] else None),
    ):
        os.environ.update(values)
        if cron is not None:
            refuse_cron(cron)
        display.say(f"starting; logs in {place.logs}")
        if word:
            display.say(f"user and password: {place.auth}")
        serve_(place, values, prepare=prepare, announce=display.say, stop=stop)
    display.say("stopped")
    return Exit.COMPLETE


def _schedule(
    folders: tuple[Path, ...], out: Path | None, *, every: str, cron: str | None, site: str | None, file: Path | None
) -> dict[str, Any]:
    """Check what `deploy` and `serve` are given, and return it as `install` takes it."""
    watch_: dict[str, Any] | None = None
    site = whole_path(site) if site else None
    if folders or out or file:
        given = {"folders": folders or None, "out": out, "site": site}
        resolved = resolve_watch(
            file=file, command_line={key: value for key, value in given.items() if value is not None}
        )
        confine(resolved)
        watch_ = resolved.model_dump(mode="json")
        site = resolved.site
        # Looks stay short, and calls are runs of their own.
        watch_["deployment"] = resolved.deployment or f"basecall/{load_site(site).kind}"
    kind = load_site(site).kind if site else "local"
    return {"watch": watch_, "every": parse_duration(every), "cron": cron, "site": site, "kind": kind}


@app.command(name="replay")
def replay_(
    *sources: Path,
    out: Path,
    reads: int = 400,
    reads_per_file: int = 100,
    channels: int = 64,
    mean_samples: int = 20_000,
    pace: float = 0.0,
    seed: int = 1,
    live: bool = False,
    flow_cell: str = "FAX00001",
    sample: str = "replay",
) -> int:
    """Play real signal as a new run: POD5 files as a sequencer would write them.

    Parameters
    ----------
    sources
        POD5 files, or folders of them, to take signal from; none: the read that ships in ont-pybasecall-client-lib.
    out
        Folder for the new POD5 files.
    reads
        Reads in all.
    reads_per_file
        Reads per file.
    channels
        Channels that they come from.
    mean_samples
        Mean length of a read, samples.
    pace
        Seconds from one file to the next; 0: as fast as it goes.
    seed
        The same seed and arguments give the same run.
    live
        Write as MinKNOW does: in its tree of folders, and with a final_summary at the end.
    flow_cell
        Id of the flow cell.
    sample
        Id of the sample.
    """
    display = Display(json=False)
    settings = ReplaySettings(
        reads=reads,
        reads_per_file=reads_per_file,
        channels=channels,
        mean_samples=mean_samples,
        seed=seed,
        flow_cell_id=flow_cell,
        sample_id=sample,
    )
    pause = threading.Event()
    for path in replay(list(sources) or [bundled_source()], out, settings, minknow=live):
        display.say(f"wrote {path}")
        pause.wait(pace)
    return Exit.COMPLETE


@app.command
def demo(*, out: Path = Path("demo-run"), json: Json = False) -> int:
    """Call a small run made of real signal, here and now: no GPU, no ONT account.

    Parameters
    ----------
    out
        Folder for the demo's POD5 files and its results.
    """
    display = Display(json=json)
    display.say("replaying a real R10.4.1 read as a run of 300 reads in 6 files")
    pod5 = out / "pod5"
    for _ in replay([bundled_source()], pod5, ReplaySettings(reads=300, reads_per_file=50, mean_samples=12_000)):
        pass
    values = {"input": (pod5,), "out": out / "called", "batch_samples": 400_000}
    return _run(resolve_settings(file=None, environment={}, command_line=values), display)


def _run(settings: RunSettings, display: Display, *, metrics_port: int | None = None) -> int:
    workspace = Workspace(settings.out)
    if merged := _done(settings, display):
        display.say(f"{settings.out} is complete already; nothing was done")
        display.result(merged, _flawed(workspace))
        return _verdict(merged)
    site = load_site(settings.site)
    with _stoppable(), umask_of(site):
        workspace.create()
        with (
            alone(workspace.lock, announce=display.say),
            _metrics(metrics_port, run_out=workspace.out),
            prefect_api(log_folder=workspace.logs, announce=display.say, host=address_of(site), meanwhile=_import_flow),
        ):
            basecall_flow = _import_flow()
            with display.progress(Watch(workspace)):
                merged = basecall_flow(**dict(settings))
    display.result(merged, _flawed(workspace))
    return _verdict(merged)


def _import_flow() -> Callable[..., Any]:
    """Import the flow only where it runs: Prefect and Dask cost 3 s of CPU, and read the environment as they do."""
    from flows.basecall import basecall_flow

    return basecall_flow


@contextmanager
def _metrics(port: int | None, *, run_out: Path | None = None, watch_out: Path | None = None) -> Iterator[None]:
    """Serve the figures of a run, or of a watch and its open runs."""
    if port is None:
        yield
        return
    from deployments.metrics import RunCollector, WatchCollector, endpoint, open_runs  # brings in Dask

    collectors: list[Any] = []
    if run_out:
        collectors.append(RunCollector(lambda: [run_out]))
    if watch_out:
        collectors += [RunCollector(lambda: open_runs(watch_out)), WatchCollector(watch_out)]
    with endpoint(port, *collectors):
        yield


def _stored(workspace: Workspace, output: Mapping[str, Any] | None = None) -> RunSettings:
    """Return the settings that a run was called with, some of its output's changed.

    For what calls nothing: input and sample sheet need not be there any more, e.g. since they were archived.
    """
    told = read_json(workspace.settings)
    if told is None:
        raise SettingsError(
            f"{workspace.settings} is not there; `shoal run` with the settings that it was begun with writes it anew"
        )
    stored = {key: value for key, value in told.items() if key != "digest"}
    stored["out"] = workspace.out
    stored["output"] |= {key: value for key, value in (output or {}).items() if value is not None}
    sheet = stored["output"].pop("sample_sheet", None)
    settings = checked(RunSettings, {**stored, "input": [workspace.out]})
    return settings.model_copy(
        update={
            "input": tuple(map(Path, stored["input"])),
            "output": settings.output.model_copy(update={"sample_sheet": Path(sheet) if sheet else None}),
        }
    )


def _sort_again(
    workspace: Workspace,
    settings: RunSettings,
    *,
    display: Display,
    min_qscore: float | None = None,
    sheet: SampleSheet | None = None,
) -> int:
    """Add to the choice by which a finished run is sorted, and merge it by that."""
    if merged_before(workspace) is None:
        raise SettingsError(f"{workspace.out} is not complete; the same `shoal run` goes on")
    with umask_of(load_site(settings.site)), alone(workspace.lock, announce=display.say):
        before = read_choice(workspace) or Choice()
        choose(
            workspace,
            Choice(
                min_qscore=before.min_qscore if min_qscore is None else min_qscore,
                sheet=sheet or before.sheet,
            ),
        )
    return _merge_again(workspace, settings, display)


def _merge_again(workspace: Workspace, settings: RunSettings, display: Display) -> int:
    with umask_of(load_site(settings.site)), alone(workspace.lock, announce=display.say):
        merged = merge_results(settings)
    display.result(merged, _flawed(workspace))
    return _verdict(merged)


def _done(settings: RunSettings, display: Display) -> MergedRun | None:
    """Return the result, when there is nothing left to do; refuse what can't be done before anything is started."""
    confine(settings)
    refuse_site(load_site(settings.site))
    launched = plan_input(settings)  # the flow's launch does it again: it may run elsewhere, and later
    if settings.strict:
        refuse_flaws(launched.plan)
    display.refusals(launched.plan)
    workspace = Workspace(settings.out)
    if launched.left or not merged_by(workspace, settings.output):
        return None
    return merged_before(workspace, plan_digest(launched.plan, launched.reads))


def _verdict(merged: MergedRun) -> int:
    return Exit.COMPLETE if merged.flawless else Exit.FLAWED


def _flawed(workspace: Workspace) -> list[PlannedFile]:
    return [file for file in read_plan(workspace).files if file.status != "ok"]


def _existing(folder: Path) -> Workspace:
    workspace = Workspace(folder)
    if not workspace.state.is_dir():
        raise SettingsError(f"{folder} is not a run folder of Shoal's: it has no {workspace.state.name}")
    return workspace


@contextmanager
def _stoppable_event() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C and SIGTERM set."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Make SIGTERM do what Ctrl-C does, so that workers and server are ended before we are."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        raise StoppedError("stopped; the same command goes on from here") from error
    finally:
        signal.signal(signal.SIGTERM, before)
