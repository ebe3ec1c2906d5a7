"""Launch: settings in, a plan out. Scans the input, cuts batches, subtracts what is committed, bundles the rest."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.core.batches import Batch, Bundle, bundle, calling_seconds
from tasks.core.errors import ChemistryError, InputError, SettingsError
from tasks.core.plan import Found, FoundFile, Plan, PlannedReads, extend_plan, make_plan
from tasks.core.reads import RunInfo
from tasks.engines.registry import check_run, identify, samples_per_second
from tasks.formats.commit import committed_ids
from tasks.formats.outputs import Writing
from tasks.formats.planfile import has_plan, read_plan, read_planned_reads, remove_unfinished, write_plan
from tasks.formats.pod5 import Pod5Index, find_pod5, scan_pod5
from tasks.formats.reference import refuse_for_cram
from tasks.formats.tree import refuse_foreign
from tasks.formats.workspace import Workspace, read_json, write_json
from tasks.settings import DORADO, RunSettings, decisive

logger = logging.getLogger(__name__)

#: Files by which a file system is judged, and threads for a slow one.
SAMPLED = 32
SCANNERS = 16
#: Task runs per flow run that Prefect's server carries easily.
MAX_BUNDLES = 400


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Launched:
    """The plan, and what of it is left to do."""

    plan: Plan
    reads: PlannedReads
    committed: frozenset[str]

    @property
    def left(self) -> tuple[Batch, ...]:
        """Batches that are not committed yet."""
        return tuple(batch for batch in self.plan.batches if batch.batch_id not in self.committed)


def launch(settings: RunSettings) -> Launched:
    """Plan a run folder, or go on from the plan it has, and write the plan down. Only for the flow that owns it.

    Raises:
        SettingsError: there is nothing to call; the folder holds a run with other settings, or calls that are not
            ours; with `strict`, any of the input can't be used.
    """
    workspace = Workspace(settings.out)
    remove_unfinished(workspace)
    launched = plan_input(settings)
    if settings.strict:
        refuse_flaws(launched.plan)
    workspace.create()
    _keep_sheet(workspace, settings)
    write_plan(workspace, launched.plan, launched.reads)
    write_json(workspace.settings, {"digest": settings.digest(), **settings.model_dump(mode="json")})
    return launched


def plan_input(settings: RunSettings) -> Launched:
    """Work out the plan and change nothing, for a flow may be launching there just now."""
    workspace = Workspace(settings.out)
    _refuse_other_settings(workspace, settings)
    _refuse_idle_reference(settings)
    identity = identify(settings.engine)  # refuses a model or package that is not there, whatever is in the input
    Writing.of(identity, settings.output, 0.0)  # refuses a sample sheet or reference that workers could not read
    if "cram" in settings.output.formats and settings.output.reference:
        refuse_for_cram(settings.output.reference)
    found = scan(settings.input, refusal=lambda run: _refusal(settings, run))
    committed = frozenset(committed_ids(workspace))
    if has_plan(workspace):
        plan, reads = extend_plan(
            read_plan(workspace),
            read_planned_reads(workspace),
            found,
            batch_samples=settings.batch_samples,
            committed=committed,
            accept_missing=settings.accept_missing,
        )
    else:
        plan, reads = make_plan(found, batch_samples=settings.batch_samples)
    if not plan.files:
        raise SettingsError(f"no POD5 files (*.pod5) in {', '.join(map(str, settings.input))}")
    refuse_foreign(workspace, plan)
    return Launched(plan=plan, reads=reads, committed=committed)


def scan(inputs: tuple[Path, ...], *, refusal: Callable[[RunInfo], str]) -> Found:
    """Index all input files, without touching signal; a file that can't be read is listed with its reason.

    Args:
        inputs: Folders and files.
        refusal: Says why a run can't be called; the empty string when it can.
    """
    runs: dict[tuple[str | int, ...], RunInfo] = {}
    files: list[FoundFile] = []
    parts: list[tuple[Pod5Index, int]] = []
    for path, index in _scan_each(find_pod5(inputs)):
        if isinstance(index, InputError):
            logger.warning("left out %s", index)
            files.append(FoundFile(path=index.path, size=_size(path), reason=index.reason, message=index.message))
            continue
        for run in index.runs:
            runs.setdefault(run.key, run)
        parts.append((index, len(files)))
        files.append(FoundFile(path=str(path), size=index.size, reads=len(index.read_ids)))
    place = {key: i for i, key in enumerate(runs)}

    def joined(arrays: list[npt.NDArray[Any]], dtype: type, shape: tuple[int, ...] = (0,)) -> npt.NDArray[Any]:
        whole: npt.NDArray[Any] = np.concatenate([np.empty(shape, dtype), *arrays]).astype(dtype, copy=False)
        return whole

    return Found(
        runs=tuple(runs.values()),
        refused=tuple(refusal(run) for run in runs.values()),
        files=tuple(files),
        read_ids=joined([index.read_ids for index, _ in parts], np.uint8, (0, 16)),
        num_samples=joined([index.num_samples for index, _ in parts], np.int64),
        run=joined(
            [np.array([place[run.key] for run in index.runs])[index.run_of_read] for index, _ in parts], np.int16
        ),
        file=joined([np.full(len(index.read_ids), number) for index, number in parts], np.int32),
        row=joined([np.arange(len(index.read_ids)) for index, _ in parts], np.uint32),
    )


def bundles_left(
    batches: tuple[Batch, ...], settings: RunSettings, *, slots: int, round_: int, first: int
) -> tuple[Bundle, ...]:
    """Bundle what is left; every round in smaller bundles, so that a batch which kills its worker takes less along."""
    return bundle(
        batches,
        bundle_samples=max(settings.bundle_samples >> (2 * round_), 1),
        slots=slots,
        max_bundles=MAX_BUNDLES,
        first=first,
    )


def estimated_seconds(batches: Sequence[Batch], settings: RunSettings, *, slots: int) -> float:
    """Estimate how long it takes to call batches; 0: unknown."""
    return calling_seconds(batches, rate=samples_per_second(settings.engine), slots=slots)


def refuse_flaws(plan: Plan) -> None:
    """Raise SettingsError naming every file of the input that is not called whole."""
    flawed = [file for file in plan.files if file.status != "ok"]
    if flawed:
        listed = "\n".join(f"  {file.path}: {file.reason}: {file.message}" for file in flawed)
        raise SettingsError(f"--strict, and {len(flawed)} of {len(plan.files)} files can't be called whole:\n{listed}")


def with_kept_sheet(settings: RunSettings) -> RunSettings:
    """Name the sample sheet that launch kept: workers read it again and again, and a person may edit the original."""
    kept = Workspace(settings.out).sample_sheet
    if settings.output.sample_sheet is None or not kept.exists():
        return settings
    return settings.model_copy(update={"output": settings.output.model_copy(update={"sample_sheet": kept})})


def _keep_sheet(workspace: Workspace, settings: RunSettings) -> None:
    """Copy the sample sheet, until something is called by it."""
    binds = workspace.sample_sheet.exists() and committed_ids(workspace)
    if settings.output.sample_sheet is not None and not binds:
        new = workspace.sample_sheet.with_name("sample_sheet.csv.new")
        shutil.copyfile(settings.output.sample_sheet, new)
        new.replace(workspace.sample_sheet)


def _refuse_other_settings(workspace: Workspace, settings: RunSettings) -> None:
    """Raise SettingsError naming all that differs from what the folder's run was begun with."""
    stored = read_json(workspace.settings)
    if stored is None:
        return
    before, now = decisive(stored), decisive(settings.model_dump(mode="json"))
    sheet = settings.output.sample_sheet
    if sheet is not None and before["output.sample_sheet"] is not None and workspace.sample_sheet.exists():
        if committed_ids(workspace) and sheet.read_bytes() != workspace.sample_sheet.read_bytes():
            raise SettingsError(
                f"output.sample_sheet: {sheet} is not what it was when the run in {settings.out} was begun; give "
                f"{workspace.sample_sheet}, which was kept, and the new one to `shoal demux` when the run is complete"
            )
        before["output.sample_sheet"] = str(sheet)  # wherever it lay: its content is the same, or was never used
    differing = [f"\n  {key}: begun with {before[key]!r}, given {now[key]!r}" for key in now if before[key] != now[key]]
    if differing:
        raise SettingsError(
            f"{settings.out} holds a run with other settings (see {workspace.settings}); give those it was begun with, "
            f"or another output folder:{''.join(differing)}"
        )


def _refuse_idle_reference(settings: RunSettings) -> None:
    """Raise SettingsError where a reference would be of no use: the calls would look as if they had been aligned."""
    if settings.output.reference and settings.engine.kind not in DORADO and "cram" not in settings.output.formats:
        raise SettingsError(
            f"output.reference: the {settings.engine.kind} engine aligns to none; {' and '.join(DORADO)} do; or leave "
            f"{settings.output.reference} out, and align the calls with minimap2"
        )


def _refusal(settings: RunSettings, run: RunInfo) -> str:
    try:
        check_run(settings.engine, run)
    except ChemistryError as error:
        return str(error)
    return ""


def _scan_each(paths: list[Path]) -> Iterator[tuple[Path, Pod5Index | InputError]]:
    """Scan files one after another; in threads where the first ones show that the file system makes us wait.

    On a local disk threads would only contend for Python's lock, at twice the CPU.
    """
    wall, cpu = time.perf_counter(), time.thread_time()
    yield from map(_try_scan, paths[:SAMPLED])
    if time.perf_counter() - wall < 4 * (time.thread_time() - cpu):
        yield from map(_try_scan, paths[SAMPLED:])
        return
    with ThreadPoolExecutor(SCANNERS) as pool:
        yield from pool.map(_try_scan, paths[SAMPLED:])


def _try_scan(path: Path) -> tuple[Path, Pod5Index | InputError]:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        return path, InputError(shown, "bad_name", "its name is not UTF-8, and no table can hold it; rename it")
    try:
        return path, scan_pod5(path)
    except InputError as error:
        return path, error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
