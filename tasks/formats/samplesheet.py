"""MinKNOW's sample sheet: which barcode of which flow cell is which sample.

Columns: ONT output specification, sample_sheet. A row holds for the runs that agree with all it says of them.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.core.errors import SettingsError
from tasks.core.reads import RunInfo

COLUMNS = (
    "protocol_run_id",
    "position_id",
    "flow_cell_id",
    "sample_id",
    "experiment_id",
    "flow_cell_product_code",
    "kit",
    "barcode",
    "alias",
    "type",
)
TYPES = (
    "na",
    "test_sample",
    "positive_control",
    "negative_control",
    "no_template_control",
    "positive_control_1",
    "positive_control_2",
)
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
_BARCODE = re.compile(r"barcode\d{2,3}")
#: Names of folders that an alias must leave alone.
_TAKEN = re.compile(r"barcode\d+|unclassified|mixed")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One barcode of a sample sheet. An empty condition holds for every run."""

    line: int
    protocol_run_id: str = ""
    position_id: str = ""
    flow_cell_id: str = ""
    experiment_id: str = ""
    barcode: str
    alias: str
    type: str = ""

    def of(self, run: RunInfo) -> bool:
        """Tell whether the row holds for a run."""
        return all(
            not wanted or wanted == given
            for wanted, given in (
                (self.protocol_run_id, run.protocol_run_id),
                (self.position_id, run.sequencer_position),
                (self.flow_cell_id, run.flow_cell_id),
                (self.experiment_id, run.experiment_name),
            )
        )

    @property
    def place(self) -> tuple[str, ...]:
        """What the row says of the run."""
        return self.protocol_run_id, self.position_id, self.flow_cell_id, self.experiment_id


@dataclass(frozen=True, slots=True)
class SampleSheet:
    """The rows of a sample sheet."""

    rows: tuple[SampleRow, ...]

    def find(self, arrangement: str, run: RunInfo) -> tuple[str, str]:
        """Return alias and type of a barcode; two empty strings where the sheet has no row for it."""
        for row in self.rows:
            if row.barcode == arrangement and row.of(run):
                return row.alias, row.type
        return "", ""

    def as_json(self) -> list[dict[str, Any]]:
        """Return the rows in a form that JSON can hold."""
        return [asdict(row) for row in self.rows]

    @classmethod
    def from_json(cls, rows: Iterable[dict[str, Any]]) -> SampleSheet:
        """Make a sheet from what `as_json` gave."""
        return cls(tuple(SampleRow(**row) for row in rows))


def read_sample_sheet(path: Path) -> SampleSheet:
    """Read and check a sample sheet (CSV).

    Raises:
        SettingsError: names file, line, value and what is allowed; one line per mistake.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            head = [name.strip() for name in reader.fieldnames or ()]
            _check_columns(path, head)
            reader.fieldnames = head
            read = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SettingsError(f"sample sheet {path} can't be read: {error}") from error
    rows: list[SampleRow] = []
    mistakes: list[str] = []
    for line, values in read:
        if None in values or None in values.values():
            count = sum(value is not None for name, value in values.items() if name) + len(values.get(None, ()))
            mistakes.append(f"{path}:{line}: {count} values under {len(head)} columns")
            continue
        row = _row(line, {name: value.strip() for name, value in values.items()})
        mistakes += [f"{path}:{line}: {mistake}" for mistake in _mistakes(row, rows)]
        rows.append(row)
    if not rows and not mistakes:
        mistakes.append(f"{path}: has no row below its header")
    if mistakes:
        raise SettingsError("\n".join(mistakes))
    return SampleSheet(tuple(rows))


def _check_columns(path: Path, head: list[str]) -> None:
    unknown = [name for name in head if name not in COLUMNS]
    missing = [name for name in ("barcode", "alias") if name not in head]
    doubled = sorted({name for name in head if head.count(name) > 1})
    if not {"flow_cell_id", "position_id", "protocol_run_id"} & set(head):
        missing.append("flow_cell_id (or position_id, or protocol_run_id)")
    for what, names in (("unknown", unknown), ("missing", missing), ("doubled", doubled)):
        if names:
            raise SettingsError(f"{path}:1: {what} columns: {', '.join(names)}; known: {', '.join(COLUMNS)}")


def _row(line: int, values: dict[str, str]) -> SampleRow:
    names = ("protocol_run_id", "position_id", "flow_cell_id", "experiment_id", "type")
    return SampleRow(
        line=line,
        barcode=values["barcode"].lower(),
        alias=values["alias"] or values["barcode"].lower(),
        **{name: values.get(name, "") for name in names},
    )


def _mistakes(row: SampleRow, earlier: list[SampleRow]) -> list[str]:
    """Say what is wrong with a row, given those above it."""
    mistakes = []
    if not _BARCODE.fullmatch(row.barcode):
        mistakes.append(f"barcode {row.barcode!r} is not of the form barcode01")
    if not _ALIAS.fullmatch(row.alias):
        mistakes.append(f"alias {row.alias!r} must be 1 to 40 letters, digits, '_', '-' or '.'")
    elif row.alias != row.barcode and _TAKEN.fullmatch(row.alias):
        mistakes.append(f"alias {row.alias!r} is the name of another folder")
    if row.type and row.type not in TYPES:
        mistakes.append(f"type {row.type!r} is none of {', '.join(TYPES)}")
    if not (row.flow_cell_id or row.position_id or row.protocol_run_id):
        mistakes.append("says neither flow_cell_id nor position_id nor protocol_run_id")
    for other in earlier:
        if other.place != row.place:
            continue
        if other.barcode == row.barcode:
            mistakes.append(f"barcode {row.barcode} is on line {other.line} already")
        elif other.alias == row.alias:
            mistakes.append(f"alias {row.alias!r} is that of {other.barcode} on line {other.line} already")
    return mistakes
