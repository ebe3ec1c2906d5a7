"""Values and POD5 files made for tests."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pod5

from tasks.core.reads import Read, RunInfo

START = datetime(2026, 11, 22, 8, 30, tzinfo=timezone.utc)

#: What a frame of compressed signal begins with.
ZSTD = b"\x28\xb5\x2f\xfd"


def run_info(**changes: Any) -> RunInfo:
    """Make a run of R10.4.1 DNA."""
    values: dict[str, Any] = {
        "acquisition_id": "0123456789abcdef0123456789abcdef01234567",
        "acquisition_start_time": START,
        "protocol_run_id": "11111111-2222-4333-8444-555555555555",
        "protocol_start_time": START,
        "flow_cell_id": "FAX12345",
        "flow_cell_product_code": "FLO-PRO114M",
        "sequencing_kit": "sqk-lsk114",
        "sample_rate": 5000,
        "experiment_name": "experiment 1",
        "sample_id": "sample-7",
        "sequencer_position": "2A",
        "sequencer_position_type": "PromethION",
        "system_type": "",
        "software": "tests",
    }
    return RunInfo(**{**values, **changes})


def read(samples: int = 5000, *, number: int = 1, position: int = 0, **changes: Any) -> Read:
    """Make a read of noise around the level of a strand in the pore."""
    signal = np.random.default_rng(number).normal(600, 60, samples).astype(np.int16)
    values: dict[str, Any] = {
        "read_id": str(uuid.UUID(int=number + (4 << 76) + (8 << 60))),
        "signal": signal,
        "calibration_offset": -10.0,
        "calibration_scale": float(np.float32(0.15)),  # what POD5 can hold
        "run": run_info(),
        "channel": 17,
        "mux": 2,
        "read_number": number,
        "start_sample": 10_000 * number,
        "minknow_events": 100,
        "end_reason": "signal_positive",
        "pore_type": "not_set",
        "file": "made.pod5",
        "row": position,
        "position": position,
    }
    return Read(**{**values, **changes})


def write_pod5(
    path: Path,
    lengths: Sequence[int],
    *,
    first: int = 0,
    seed: int = 1,
    version: int = 4,
    mux: int | None = None,
    pore_type: str = "not_set",
    **run: Any,
) -> Path:
    """Write a POD5 file of noise reads whose ids follow from `seed` and number; `run` changes the run info."""
    random = np.random.default_rng(seed)
    info: dict[str, Any] = {
        "acquisition_id": f"{seed:040x}",
        "acquisition_start_time": START,
        "adc_max": 2047,
        "adc_min": -2048,
        "context_tags": {},
        "experiment_name": "experiment",
        "flow_cell_id": "FAX12345",
        "flow_cell_product_code": "FLO-PRO114M",
        "protocol_name": "sequencing",
        "protocol_run_id": str(uuid.UUID(int=seed + (4 << 76) + (8 << 60))),
        "protocol_start_time": START,
        "sample_id": "sample",
        "sample_rate": 4000,
        "sequencing_kit": "sqk-lsk114",
        "sequencer_position": "1A",
        "sequencer_position_type": "GridION",
        "software": "tests",
        "system_name": "tests",
        "system_type": "tests",
        "tracking_id": {},
    }
    made = pod5.RunInfo(**{**info, **run})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pod5.Writer(path) as writer:
        for number, length in enumerate(lengths, first):
            writer.add_read(
                pod5.Read(
                    read_id=read_uuid(seed, number, version),
                    pore=pod5.Pore(1 + number % 100, 1 + number % 4 if mux is None else mux, pore_type),
                    calibration=pod5.Calibration(offset=-10.0, scale=0.15),
                    read_number=number,
                    start_sample=1000 * number,
                    median_before=200.0,
                    end_reason=pod5.EndReason(pod5.EndReasonEnum.SIGNAL_POSITIVE, forced=False),
                    run_info=made,
                    num_minknow_events=length // 10,
                    signal=random.normal(600, 60, length).astype(np.int16),
                )
            )
    return path


def read_uuid(seed: int, number: int, version: int = 4) -> uuid.UUID:
    """Return the id of a made read."""
    return uuid.UUID(int=(seed << 96) + (version << 76) + (8 << 60) + number)


def damage_signal(path: Path, number: int = 1) -> None:
    """Spoil one compressed chunk of signal in a POD5 file; all else stays readable."""
    content = bytearray(path.read_bytes())
    frame = -1
    for _ in range(number + 1):
        frame = content.index(ZSTD, frame + 1)
    content[frame : frame + len(ZSTD)] = b"rust"
    path.write_bytes(content)


def damage_signal_table(path: Path) -> None:
    """Spoil the list of contents of a POD5 file's signal table: it can be planned, and no signal be read."""
    content = bytearray(path.read_bytes())
    end = content.index(b"ARROW1", content.index(b"ARROW1") + 1)
    content[end - 60 : end] = b"rust" * 15
    path.write_bytes(content)
