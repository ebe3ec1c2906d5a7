"""A group of reads laid out as a folder of POD5 files, for a program that takes nothing else."""

from __future__ import annotations

import math
import shutil
import uuid
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

import numpy as np
import pod5

from tasks.core.reads import Read, RunInfo

#: Reads handed to the POD5 library at once.
_WRITTEN_AT_ONCE = 100
_EPOCH = datetime.fromtimestamp(0, timezone.utc)


class StagedGroup:
    """Reads of one run, in POD5 files under `folder`.

    A read is written into a POD5 file of ours. Where all reads of a whole input file come one after another, and
    fit into `hold`, the file is linked instead: nothing is compressed a second time.

    The signal of the first `hold` samples is kept with the reads. Later ones are kept without it, as zeros that take no
    memory, so that a group may be larger than memory: it is bounded by the disk.
    """

    def __init__(self, folder: Path, run: RunInfo, *, hold: int) -> None:
        self.folder = folder
        self.run = run
        self.samples = 0
        #: By read id.
        self.reads: dict[str, Read] = {}
        self._hold = hold
        self._writer: pod5.Writer | None = None
        self._info = _run_info(run)
        #: Reads of a file that may yet come whole, and the number of reads in it.
        self._begun: list[Read] = []
        self._begun_samples = 0
        self._expected = 0
        self._links = 0
        self._unwritten: list[pod5.Read] = []
        folder.mkdir(parents=True)

    def __enter__(self) -> StagedGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def add(self, read: Read) -> None:
        """Stage a read of the group's run, whose id the group does not have yet.

        Raises:
            ValueError, RuntimeError: POD5 can't hold it; the group is as before.
        """
        made = self._made(read)
        self.samples += read.num_samples
        if not self._goes_on(read):
            self._write_begun()
            if read.row == 0 and read.num_samples <= self._hold:
                self._expected = _reads_in(read.file)
        if self._expected:
            self._begun.append(read)
            self._begun_samples += read.num_samples
            if len(self._begun) == self._expected:
                self._link(read.file)
            elif self._begun_samples > self._hold:
                self._write_begun()
        else:
            self._write(made)
        self.reads[read.read_id] = read if self.samples <= self._hold else _without_signal(read)

    def close(self) -> None:
        """Finish the files. A group may be closed empty, and twice."""
        self._write_begun()
        self._flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def remove(self) -> None:
        """Take the folder away."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _goes_on(self, read: Read) -> bool:
        """Tell whether a read is the next one of the file that has begun."""
        return bool(self._begun) and self._begun[-1].file == read.file and read.row == len(self._begun)

    def _link(self, file: str) -> None:
        (self.folder / f"linked-{self._links}.pod5").symlink_to(Path(file).absolute())
        self._links += 1
        self._begun.clear()
        self._begun_samples = self._expected = 0

    def _write_begun(self) -> None:
        for read in self._begun:
            self._write(self._made(read))
        self._begun.clear()
        self._begun_samples = self._expected = 0

    def _write(self, read: pod5.Read) -> None:
        self._unwritten.append(read)
        if len(self._unwritten) >= _WRITTEN_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self._unwritten:
            if self._writer is None:
                self._writer = pod5.Writer(self.folder / "staged.pod5", "shoal")
            self._writer.add_reads(self._unwritten)
            self._unwritten.clear()

    def _made(self, read: Read) -> pod5.Read:
        reason = pod5.EndReasonEnum.__members__.get(read.end_reason.upper(), pod5.EndReasonEnum.UNKNOWN)
        return pod5.Read(
            read_id=uuid.UUID(read.read_id),
            pore=pod5.Pore(read.channel, read.mux, read.pore_type),
            calibration=pod5.Calibration(offset=read.calibration_offset, scale=read.calibration_scale),
            read_number=read.read_number,
            start_sample=read.start_sample,
            median_before=math.nan,
            end_reason=pod5.EndReason(reason, forced=False),
            run_info=self._info,
            num_minknow_events=read.minknow_events,
            signal=read.signal,
        )


def _without_signal(read: Read) -> Read:
    return replace(read, signal=np.broadcast_to(np.int16(0), (read.num_samples,)))


def _reads_in(file: str) -> int:
    """Count the reads of a file that can be linked; 0 when it can't."""
    if not Path(file).is_file():
        return 0
    with pod5.Reader(file) as reader:
        return int(reader.num_reads)


def _run_info(run: RunInfo) -> pod5.RunInfo:
    return pod5.RunInfo(
        acquisition_id=run.acquisition_id,
        acquisition_start_time=run.acquisition_start_time or _EPOCH,
        adc_max=2047,
        adc_min=-2048,
        context_tags=dict(run.context_tags),
        experiment_name=run.experiment_name,
        flow_cell_id=run.flow_cell_id,
        flow_cell_product_code=run.flow_cell_product_code,
        protocol_name=run.tag("exp_script_name"),
        protocol_run_id=run.protocol_run_id,
        protocol_start_time=run.protocol_start_time or _EPOCH,
        sample_id=run.sample_id,
        sample_rate=run.sample_rate,
        sequencing_kit=run.sequencing_kit,
        sequencer_position=run.sequencer_position,
        sequencer_position_type=run.sequencer_position_type,
        software=run.software,
        system_name=run.tag("hostname"),
        system_type=run.system_type,
        tracking_id=dict(run.tracking_id),
    )
