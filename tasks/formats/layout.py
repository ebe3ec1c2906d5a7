"""MinKNOW's tree of folders and files (ONT output specification, experiment_layout).

Missing metadata becomes `unknown`, never a made-up date.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import Literal

from tasks.core.reads import RunInfo

UNKNOWN = "unknown"
Kind = Literal["fastq", "bam", "sam", "cram"]
#: Folder (before `_pass` and `_fail`) and suffix of each kind of file; SAM goes where dorado puts it.
KINDS: Mapping[Kind, tuple[str, str]] = {
    "fastq": ("fastq", "fastq.gz"),
    "bam": ("bam", "bam"),
    "sam": ("bam", "sam"),
    "cram": ("cram", "cram"),
}
#: Bytes of a part of a path: names are made of two at most that may be as long, and file systems take 255.
LONGEST = 100
_UNFIT = re.compile(r"[^\w.+=@-]+")


def path_part(text: str) -> str:
    """Make text fit for one part of a path: no slash, blank, control character or leading dot.

    What is too long for a file's name, beside what else stands there, ends with a digest, so that it stays apart.
    """
    part = _UNFIT.sub("_", text.strip()).lstrip(".") or UNKNOWN
    encoded = part.encode()
    if len(encoded) <= LONGEST:
        return part
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[: LONGEST - 9].decode('utf-8', 'ignore')}-{digest}"


def run_folder(run: RunInfo) -> PurePosixPath:
    """Return experiment/sample/date_position_flowcell_protocol of a run."""
    started = run.protocol_start_time or run.acquisition_start_time
    date = started.strftime("%Y%m%d_%H%M") if started else UNKNOWN
    name = f"{date}_{path_part(run.sequencer_position)}_{path_part(run.flow_cell_id)}_{_short(run.protocol_run_id)}"
    return PurePosixPath(path_part(run.experiment_name), path_part(run.sample_id), name)


def reads_name(
    run: RunInfo, kind: Kind, *, passes: bool, batch: int, barcode: str = "", marker: str = ""
) -> PurePosixPath:
    """Return the path of a file of calls in its run's folder.

    Args:
        barcode: Folder of the barcode; empty without barcodes.
        marker: Set into the name when the bases are not real.
    """
    verdict = "pass" if passes else "fail"
    parts = (path_part(run.flow_cell_id), verdict, barcode, *_ids(run), marker, str(batch))
    tree, suffix = KINDS[kind]
    return PurePosixPath(f"{tree}_{verdict}", barcode, f"{'_'.join(filter(None, parts))}.{suffix}")


def summary_name(run: RunInfo, marker: str = "") -> str:
    """Return the name of a run's sequencing summary."""
    return _name("sequencing_summary", run, marker, "txt")


def barcoding_summary_name(run: RunInfo, marker: str = "") -> str:
    """Return the name of a run's barcoding summary."""
    return _name("barcoding_summary", run, marker, "txt")


def final_summary_name(run: RunInfo, marker: str = "") -> str:
    """Return the name of a run's final summary."""
    return _name("final_summary", run, marker, "txt")


def output_hash_name(run: RunInfo, marker: str = "") -> str:
    """Return the name of a run's table of checksums."""
    return _name("output_hash", run, marker, "csv")


def final_summary(run: RunInfo, *, summary: str, fastq_files: int, processing_stopped: float) -> str:
    """Return the text of MinKNOW's final summary: `key=value` lines; a value that is not known is empty.

    Args:
        summary: Name of the sequencing summary.
        fastq_files: FASTQ files written.
        processing_stopped: When calling ended, seconds since the epoch.
    """
    stopped = datetime.fromtimestamp(processing_stopped, timezone.utc)
    rows = {
        "instrument": run.tag("device_id") or run.sequencer_position,
        "position": run.sequencer_position,
        "flow_cell_id": run.flow_cell_id,
        "sample_id": run.sample_id,
        "protocol_group_id": run.experiment_name,
        "protocol": run.tag("protocol_name") or run.tag("exp_script_name"),
        "protocol_run_id": run.protocol_run_id,
        "acquisition_run_id": run.acquisition_id,
        "started": run.acquisition_start_time.isoformat() if run.acquisition_start_time else "",
        "acquisition_stopped": "",
        "processing_stopped": stopped.isoformat(),
        "basecalling_enabled": "1",
        "sequencing_summary_file": summary,
        "fast5_files_in_final_dest": "0",
        "fast5_files_in_fallback": "0",
        "pod5_files_in_final_dest": "0",
        "pod5_files_in_fallback": "0",
        "fastq_files_in_final_dest": str(fastq_files),
        "fastq_files_in_fallback": "0",
    }
    return "".join(f"{key}={value}\n" for key, value in rows.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedFile:
    """A file of calls, for the table of checksums."""

    #: In the run's folder.
    path: str
    #: In hex.
    sha256: str
    #: Arrangement and alias; empty without barcodes.
    barcode: str = ""
    alias: str = ""


def output_hash(run: RunInfo, files: Iterable[HashedFile]) -> str:
    """Return the text of MinKNOW's table of checksums."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        (
            "runid",
            "protocol_group_id",
            "flow_cell_id",
            "sample_id",
            "file_hash",
            "file_path",
            "barcode",
            "barcode_alias",
        )
    )
    known = (run.protocol_run_id, run.experiment_name, run.flow_cell_id, run.sample_id)
    for file in files:
        table.writerow((*known, file.sha256, file.path, file.barcode, file.alias))
    return text.getvalue()


def _name(kind: str, run: RunInfo, marker: str, suffix: str) -> str:
    parts = (kind, marker, path_part(run.flow_cell_id), *_ids(run))
    return f"{'_'.join(filter(None, parts))}.{suffix}"


def _ids(run: RunInfo) -> tuple[str, str]:
    return _short(run.protocol_run_id), _short(run.acquisition_id)


def _short(identity: str) -> str:
    return path_part(identity)[:8]
