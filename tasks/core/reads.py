"""What comes in: runs and their raw reads."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """One acquisition, as the POD5 run info table tells it. Missing text is the empty string."""

    #: 40 hex digits from MinKNOW; any non-empty text from converters.
    acquisition_id: str
    #: Start of acquisition, UTC; None where the file has none (the epoch counts as none).
    acquisition_start_time: datetime | None
    protocol_run_id: str
    protocol_start_time: datetime | None
    flow_cell_id: str
    flow_cell_product_code: str
    sequencing_kit: str
    #: Hz.
    sample_rate: int
    experiment_name: str
    sample_id: str
    sequencer_position: str
    sequencer_position_type: str
    system_type: str
    software: str
    #: `context_tags` and `tracking_id` of MinKNOW; `selected_speed_bases_per_second`, `experiment_type`, … live here.
    context_tags: tuple[tuple[str, str], ...] = ()
    tracking_id: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> tuple[str | int, ...]:
        """What tells runs apart: converters and tests give several flow cells the same acquisition id."""
        return (
            self.acquisition_id,
            self.protocol_run_id,
            self.flow_cell_id,
            self.flow_cell_product_code,
            self.sequencing_kit,
            self.sample_rate,
            self.experiment_name,
            self.sample_id,
        )

    def tag(self, key: str) -> str:
        """Return the value of a context tag or tracking id; the empty string where there is none."""
        return dict(self.tracking_id).get(key, "") or dict(self.context_tags).get(key, "")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Read:
    """A raw read and where it came from. Compared by identity: a read in flight is one object."""

    #: Lower-case UUID with dashes.
    read_id: str
    #: ADC counts, int16, shape (samples,). Valid as long as the read is held.
    signal: npt.NDArray[np.int16]
    #: pA = (ADC + offset) * scale.
    calibration_offset: float
    #: pA per ADC count.
    calibration_scale: float
    run: RunInfo
    channel: int
    #: The well, 1 to 4; MinKNOW's mux.
    mux: int
    read_number: int
    #: Samples since the start of the acquisition.
    start_sample: int
    minknow_events: int
    end_reason: str
    pore_type: str
    #: Path of the POD5 file.
    file: str
    #: Row in the file's read table.
    row: int
    #: Place of the read in its batch, from 0: the order in which records are written.
    position: int = 0

    @property
    def num_samples(self) -> int:
        """Length of the signal, in samples."""
        return len(self.signal)

    def picoamperes(self) -> npt.NDArray[np.float32]:
        """Return the signal in pA, float32, shape (samples,)."""
        shifted: npt.NDArray[np.float32] = self.signal + np.float32(self.calibration_offset)
        return shifted * np.float32(self.calibration_scale)
