"""FASTQ records, with headers as MinKNOW or dorado write them.

Sources: ONT output specification, fastq/header-spec v0.1 (`minknow`: `key=value` after the id, separated by spaces);
dorado 1.4 `hts_utils` (`dorado`: SAM tags after the id, separated by tabs).
"""

from __future__ import annotations

import re
import time
from functools import lru_cache
from typing import Literal

from tasks.core.calls import Barcode, BasecalledRead, EngineIdentity
from tasks.core.reads import Read, RunInfo

HeaderProfile = Literal["minknow", "dorado"]
UNKNOWN = "unknown"
UNCLASSIFIED = "unclassified"
_MINKNOW_ALIAS = re.compile(rb" barcode_alias=\S+")
_DORADO_ALIAS = re.compile(rb"\tal:Z:(\S+)")
_UNFIT = re.compile(r"[\s\"]+")


class FastqFormatter:
    """Formats the records of one run; what is the same in all of them is worked out once."""

    def __init__(
        self, run: RunInfo, identity: EngineIdentity, profile: HeaderProfile, *, rna_as_dna: bool = False
    ) -> None:
        self._rna_as_dna = rna_as_dna
        self._rate = run.sample_rate
        start = run.acquisition_start_time
        self._epoch_ms = round(start.timestamp() * 1000) if start else None
        run_id = word(run.protocol_run_id) or UNKNOWN
        if profile == "minknow":
            self._record = self._minknow
            self._head = f"runid={run_id}"
            self._tail = (
                f"flow_cell_id={word(run.flow_cell_id) or UNKNOWN} "
                f"protocol_group_id={word(run.experiment_name) or UNKNOWN} sample_id={word(run.sample_id) or UNKNOWN}"
            )
            self._model = f"basecall_model_version_id={word(identity.model)}"
            self._gpu = f" basecall_gpu={word(identity.gpu)}" if identity.gpu else ""
        else:
            self._record = self._dorado
            self._head = f"RG:Z:{run_id}_{word(identity.model)}"
            self._gpu = f"\tDS:Z:gpu:{identity.gpu}" if identity.gpu else ""
            acquisition = f"\tDT:Z:{dorado_time(self._epoch_ms)}" if self._epoch_ms is not None else ""
            self._tail = f"\tPU:Z:{word(run.flow_cell_id) or UNKNOWN}{acquisition}"

    def record(self, read: Read, call: BasecalledRead) -> bytes:
        """Return the four lines of a record."""
        header = self._record(read, call)
        sequence = call.sequence.replace(b"U", b"T") if self._rna_as_dna else call.sequence
        return b"@%s\n%s\n+\n%s\n" % (header.encode(), sequence, call.qstring)

    def _minknow(self, read: Read, call: BasecalledRead) -> str:
        started = f" start_time={timestamp(self._started_ms(read, call))}" if self._epoch_ms is not None else ""
        barcode = call.barcode
        barcoded = f"barcode={word(barcode.arrangement)} barcode_alias={word(barcode.folder)} " if barcode else ""
        return (
            f"{call.read_id} {self._head} ch={read.channel}{started} {self._tail} {barcoded}"
            f"parent_read_id={call.parent_read_id} {self._model}{self._gpu}"
        )

    def _dorado(self, read: Read, call: BasecalledRead) -> str:
        started = f"\tst:Z:{dorado_time(self._started_ms(read, call))}" if self._epoch_ms is not None else ""
        called = f"qs:f:{call.mean_qscore:g}\tch:i:{read.channel}"
        label = barcode_label(call.barcode)
        group = f"{self._head}_{label}" if label else self._head
        barcode = call.barcode if label else None
        barcoded = f"\tSM:Z:{word(barcode.arrangement)}\tal:Z:{word(barcode.folder)}" if barcode else ""
        return f"{call.read_id}\t{group}{started}{self._gpu}\t{called}{self._tail}{barcoded}"

    def _started_ms(self, read: Read, call: BasecalledRead) -> int:
        """Return when the signal of this call began; a split read begins within its parent."""
        return (self._epoch_ms or 0) + (read.start_sample + call.split_point) * 1000 // self._rate


def barcode_label(barcode: Barcode | None) -> str:
    """Return what a read group calls a barcode: its alias, else kit and arrangement; empty when unclassified."""
    return _label(barcode.arrangement, barcode.kit, barcode.alias) if barcode else ""


@lru_cache(maxsize=4096)
def _label(arrangement: str, kit: str, alias: str) -> str:
    if arrangement == UNCLASSIFIED:
        return ""
    return word(alias) or "_".join(filter(None, (word(kit), word(arrangement))))


def renamed_header(header: bytes, barcode: Barcode) -> bytes:
    """Return a record's first line, of either profile, for a barcode that is called otherwise now."""
    if b"\t" not in header:
        return _MINKNOW_ALIAS.sub(b" barcode_alias=%s" % word(barcode.folder).encode(), header)
    old = _DORADO_ALIAS.search(header)
    if old is None:
        return header
    known = b"_".join(filter(None, (word(barcode.kit).encode(), word(barcode.arrangement).encode())))
    header = _DORADO_ALIAS.sub(b"\tal:Z:%s" % word(barcode.folder).encode(), header)
    group, _, rest = header.partition(b"\t")[2].partition(b"\t")
    for label in (known, old[1]):
        if group.endswith(b"_" + label):
            group = group[: -len(label)] + barcode_label(barcode).encode()
            break
    return header.partition(b"\t")[0] + b"\t" + group + b"\t" + rest


def timestamp(milliseconds: int) -> str:
    """Write milliseconds since the epoch as RFC 3339, UTC, with milliseconds."""
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{_minute(minutes)}:{rest // 1000:02d}.{rest % 1000:03d}+00:00"


@lru_cache(maxsize=4096)  # the reads of a batch start within hours of each other
def _minute(minutes: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M", time.gmtime(60 * minutes))


def dorado_time(milliseconds: int) -> str:
    """Write milliseconds since the epoch as dorado does: six decimals, of which it knows three."""
    return timestamp(milliseconds).replace("+", "000+")


def word(text: str) -> str:
    """Make text fit for a header, where a blank ends a value, and for tables, where no value has a blank or a quote."""
    return _UNFIT.sub("_", text.strip())
