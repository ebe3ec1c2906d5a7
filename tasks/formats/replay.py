"""Replay: real signal played as a new run, in files as MinKNOW would have written them.

For demos, rehearsals and benchmarks: what a sequencer writes in a day, without a sequencer.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pod5

from tasks.core.errors import SettingsError
from tasks.core.reads import RunInfo
from tasks.formats.layout import final_summary, final_summary_name, run_folder
from tasks.formats.pod5 import find_pod5, scan_pod5
from tasks.formats.workspace import write_text

#: pA of a strand in the pore; open pore and dead channel lie outside.
IN_PORE = (30.0, 200.0)
#: Samples per stored piece of signal: MinKNOW's own figure.
CHUNK = 102_400


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    """What to play."""

    reads: int = 400
    reads_per_file: int = 100
    channels: int = 64
    #: Lengths are drawn log-normally around this.
    mean_samples: int = 20_000
    #: Signals that differ; the reads share them, which makes large runs quick to write.
    distinct: int = 64
    seed: int = 1
    sample_id: str = "replay"
    flow_cell_id: str = "FAX00001"

    def __post_init__(self) -> None:
        for name in ("reads", "reads_per_file", "channels", "mean_samples", "distinct"):
            if getattr(self, name) < 1:
                raise SettingsError(f"replay.{name}: {getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise SettingsError(f"replay.seed: {self.seed} must be at least 0")


def bundled_source() -> Path:
    """Return the real R10.4.1 read that ships in ONT's client library.

    Raises:
        SettingsError: the library is not installed.
    """
    spec = find_spec("pybasecall_client_lib")  # found, not imported: importing loads the native library
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place, "test", "data", "dna", "file6.pod5")
        if path.is_file():
            return path
    raise SettingsError(
        "the demo's read comes with ont-pybasecall-client-lib, which is not installed; "
        "pip install ont-pybasecall-client-lib, or give POD5 files to replay"
    )


def replay(sources: list[Path], folder: Path, settings: ReplaySettings, *, minknow: bool = False) -> Iterator[Path]:
    """Write a run's POD5 files one after another, and yield each when it is whole.

    The same arguments give the same ids, signals and metadata. Each file appears under its name only when it is closed.

    Args:
        sources: POD5 files, and folders of them.
        minknow: Write as MinKNOW does: in its tree of folders, and with a final_summary (yielded last) at the end.
    """
    source = _ring(sources)
    random = np.random.default_rng(settings.seed)
    run = _run_info(source.run, settings)
    distinct = min(settings.distinct, settings.reads)
    signals = [_packed(source.signal, random, settings.mean_samples) for _ in range(distinct)]
    free_at = np.zeros(settings.channels, np.int64)
    home = folder / run_folder(_ours(run)) if minknow else folder
    folder = home / "pod5" if minknow else folder
    files = 0
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{settings.flow_cell_id}_{run.protocol_run_id[:8]}_{run.acquisition_id[:8]}"
    for number, first in enumerate(range(0, settings.reads, settings.reads_per_file)):
        path = folder / f"{stem}_{number}.pod5"
        growing = path.with_suffix(".pod5.part")
        growing.unlink(missing_ok=True)
        with pod5.Writer(growing) as writer:
            for index in range(first, min(first + settings.reads_per_file, settings.reads)):
                chunks, lengths = signals[index % len(signals)]
                channel = int(random.integers(settings.channels))
                start = int(free_at[channel]) + int(random.integers(200, 8000))
                free_at[channel] = start + sum(lengths)
                writer.add_read(
                    pod5.CompressedRead(
                        read_id=uuid.UUID(bytes=random.bytes(16), version=4),
                        pore=pod5.Pore(channel + 1, 1 + channel % 4, "not_set"),
                        calibration=source.calibration,
                        read_number=index,
                        start_sample=start,
                        median_before=source.median_before,
                        end_reason=pod5.EndReason(pod5.EndReasonEnum.SIGNAL_POSITIVE, forced=False),
                        run_info=run,
                        num_minknow_events=sum(lengths) // 10,
                        signal_chunks=chunks,
                        signal_chunk_lengths=lengths,
                    )
                )
        growing.rename(path)
        files += 1
        yield path
    if minknow:
        final = home / final_summary_name(_ours(run))
        write_text(final, _final_summary(_ours(run), files))
        yield final


def _final_summary(run: RunInfo, files: int) -> str:
    """Return the final summary of a run that was not basecalled by the sequencer."""
    theirs = {"basecalling_enabled": "0", "pod5_files_in_final_dest": str(files)}
    lines = final_summary(run, summary="", fastq_files=0, processing_stopped=time.time()).splitlines()
    pairs = (line.split("=", 1) for line in lines)
    return "".join(f"{key}={theirs.get(key, value)}\n" for key, value in pairs)


def _ours(run: pod5.RunInfo) -> RunInfo:
    """Return pod5's run info as ours."""
    tags = ("context_tags", "tracking_id")
    values: dict[str, Any] = {field.name: getattr(run, field.name) for field in fields(RunInfo)}
    return RunInfo(**{**values, **{name: tuple(sorted(values[name].items())) for name in tags}})


class _Source(NamedTuple):
    """What is replayed: in-pore signal, and the metadata of the first read."""

    #: ADC counts in the calibration below, int16, shape (samples,).
    signal: npt.NDArray[np.int16]
    calibration: pod5.Calibration
    median_before: float
    run: pod5.RunInfo


def _ring(sources: list[Path]) -> _Source:
    """Join the in-pore signal of all source reads.

    Raises:
        InputError: a file can't be read.
        SettingsError: there is no signal in any.
    """
    parts = []
    first: tuple[pod5.Calibration, float, pod5.RunInfo] | None = None
    for source in find_pod5(tuple(sources)):
        scan_pod5(source)  # says why it can't be read; the library would only say that
        with pod5.Reader(source) as reader:
            for read in reader.reads():
                own = read.calibration
                first = first or (own, read.median_before, read.run_info)
                picoamperes = (read.signal + np.float32(own.offset)) * np.float32(own.scale)
                inside = picoamperes[(picoamperes > IN_PORE[0]) & (picoamperes < IN_PORE[1])]
                parts.append(np.rint(inside / first[0].scale - first[0].offset).astype(np.int16))
    if first is None or not sum(map(len, parts)):
        raise SettingsError(f"no read with signal to replay in {', '.join(map(str, sources))}")
    return _Source(np.concatenate(parts), *first)


def _packed(
    ring: npt.NDArray[np.int16], random: np.random.Generator, mean_samples: int
) -> tuple[list[npt.NDArray[np.uint8]], list[int]]:
    """Cut a slice of the ring, of random place and length, and compress it in chunks."""
    spread = 0.6
    length = max(int(random.lognormal(np.log(mean_samples) - spread**2 / 2, spread)), 200)
    start = int(random.integers(len(ring)))
    signal = np.take(ring, np.arange(start, start + length), mode="wrap")
    pieces = [signal[at : at + CHUNK] for at in range(0, length, CHUNK)]
    return [np.asarray(pod5.vbz_compress_signal(piece)) for piece in pieces], [len(piece) for piece in pieces]


def _run_info(source: pod5.RunInfo, settings: ReplaySettings) -> pod5.RunInfo:
    """Make a run of its own: the source's chemistry, and ids that follow from the settings."""
    digest = hashlib.sha512(f"{settings} {source.acquisition_id}".encode())
    values = {name: getattr(source, name) for name in source.__dataclass_fields__}
    values |= {
        "acquisition_id": digest.hexdigest()[:40],
        "protocol_run_id": str(uuid.UUID(bytes=digest.digest()[-16:], version=4)),
        "protocol_start_time": source.acquisition_start_time - timedelta(minutes=5),
        "flow_cell_id": settings.flow_cell_id,
        "sample_id": settings.sample_id,
        "experiment_name": "replay",
        "software": "shoal replay",
    }
    return pod5.RunInfo(**values)
