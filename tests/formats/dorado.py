"""Calls taken back out of a BAM file that dorado wrote: what an engine would have handed over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pysam

from tasks.core.calls import BasecalledRead, EngineIdentity, ModifiedBases
from tasks.core.reads import Read
from tests.making import read, run_info


@dataclass(frozen=True)
class Recorded:
    """One record of dorado's, as the values that it was made of."""

    read: Read
    call: BasecalledRead
    identity: EngineIdentity


def recorded(path: Path) -> Iterator[Recorded]:
    """Yield what a BAM file holds, in its order."""
    with pysam.AlignmentFile(str(path), check_sq=False) as file:
        lines = [line.split("\t") for line in str(file.header).splitlines()]
        fields = [(line[0], dict(field.split(":", 1) for field in line[1:])) for line in lines]
        groups = {values["ID"]: values for kind, values in fields if kind == "@RG"}
        program = next(values for kind, values in fields if kind == "@PG")
        for record in file:
            group = groups[record.get_tag("RG")]
            described = dict(word.split("=", 1) for word in group["DS"].split())
            began = datetime.fromisoformat(described["acquisition_start_time"])
            samples, rate = record.get_tag("ns"), round(record.get_tag("ns") / record.get_tag("du"))
            since = (datetime.fromisoformat(record.get_tag("st")) - began) // timedelta(milliseconds=1)
            run = run_info(
                acquisition_start_time=began,
                protocol_start_time=datetime.fromisoformat(group["DT"]),
                protocol_run_id=described["runid"],
                experiment_name=described["experiment_id"],
                flow_cell_id=group["PU"],
                sample_id=group["LB"],
                sample_rate=rate,
                tracking_id=(("host_product_serial_number", group["PM"]),),
            )
            split_point = record.get_tag("sp") if record.has_tag("sp") else 0
            length = split_point + samples + (1000 if record.get_tag("er") == "unknown" else 0)
            raw = read(
                length,
                read_id=record.query_name,
                run=run,
                channel=record.get_tag("ch"),
                mux=record.get_tag("mx"),
                read_number=record.get_tag("rn"),
                start_sample=-(-since * rate // 1000) - split_point,
                minknow_events=record.get_tag("me"),
                end_reason="signal_positive" if length > split_point + samples else record.get_tag("er"),
                pore_type=record.get_tag("po"),
                file=f"/data/{record.get_tag('fn')}",
            )
            modified = None
            if record.has_tag("MM"):
                likely = np.array(record.get_tag("ML"), np.uint8)
                modified = ModifiedBases(positions=record.get_tag("MM"), probabilities=likely)
            call = BasecalledRead(
                read_id=record.query_name,
                parent_read_id=record.get_tag("pi") if record.has_tag("pi") else record.query_name,
                sequence=record.query_sequence.encode(),
                qstring=bytes(q + 33 for q in record.query_qualities),
                mean_qscore=record.get_tag("qs"),
                stride=int(described["model_stride"]),
                trimmed_samples=record.get_tag("ts"),
                split_point=split_point,
                num_samples=samples,
                scaling_midpoint=record.get_tag("sm"),
                scaling_dispersion=record.get_tag("sd"),
                scaling_version=record.get_tag("sv"),
                modified=modified,
                duplex=record.get_tag("dx"),
            )
            identity = EngineIdentity(
                engine="dorado",
                version=program["VN"],
                model=described["basecall_model"],
                model_digest="",
                stride=int(described["model_stride"]),
                gpu=program["DS"].removeprefix("gpu:"),
                modified_base_models=tuple(filter(None, described.get("modbase_models", "").split(","))),
            )
            yield Recorded(raw, call, identity)
