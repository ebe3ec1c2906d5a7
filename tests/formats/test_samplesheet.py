"""Sample sheets: what they name, and mistakes by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core.errors import SettingsError
from tasks.formats.samplesheet import SampleSheet, read_sample_sheet
from tests.making import run_info

HEAD = "flow_cell_id,experiment_id,kit,barcode,alias,type"


def sheet(path: Path, *lines: str, head: str = HEAD) -> Path:
    path.write_text("\n".join([head, *lines]) + "\n", "utf-8-sig")
    return path


def test_a_barcode_is_named_where_its_row_holds(tmp_path: Path) -> None:
    lines = [
        "FAX12345,,SQK-NBD114-24,barcode01,patient_a,test_sample",
        "FAX2,,SQK-NBD114-24,barcode01,patient_b,",
        "FAX12345,other,SQK-NBD114-24,barcode02,patient_c,",
    ]
    read = read_sample_sheet(sheet(tmp_path / "s.csv", *lines))
    assert SampleSheet.from_json(read.as_json()) == read

    def found(arrangement: str, flow_cell: str) -> tuple[str, str]:
        return read.find(arrangement, run_info(flow_cell_id=flow_cell))

    assert found("barcode01", "FAX12345") == ("patient_a", "test_sample")
    assert found("barcode01", "FAX2") == ("patient_b", "")
    assert found("barcode02", "FAX12345") == ("", "")
    assert found("unclassified", "FAX12345") == ("", "")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["F,,k,barcode01,a,", "F,,k,barcode01,b,"], r"s\.csv:3: barcode barcode01 is on line 2 already"),
        (["F,,k,barcode01,a,", "F,,k,barcode02,a,"], r"s\.csv:3: alias 'a' is that of barcode01 on line 2"),
        (["F,,k,bc1,a,"], r"s\.csv:2: barcode 'bc1' is not of the form barcode01"),
        (["F,,k,barcode01,a/b,"], r"s\.csv:2: alias 'a/b' must be"),
        (["F,,k,barcode01,barcode02,"], r"s\.csv:2: alias 'barcode02' is the name of another folder"),
        (["F,,k,barcode01,a,sample"], r"s\.csv:2: type 'sample' is none of na, test_sample"),
        ([",,k,barcode01,a,"], r"s\.csv:2: says neither flow_cell_id"),
        (["F,,k,barcode01"], r"s\.csv:2: 4 values under 6 columns"),
        (["F,,k,barcode01,a,,,x"], r"s\.csv:2: 8 values under 6 columns"),
        ([], r"s\.csv: has no row"),
    ],
)
def test_mistakes_are_named_by_line(tmp_path: Path, lines: list[str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        read_sample_sheet(sheet(tmp_path / "s.csv", *lines))


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("flow_cell_id,barcode,alias,colour", "unknown columns: colour; known: protocol_run_id"),
        ("flow_cell_id,barcode", "missing columns: alias"),
        ("barcode,alias", "missing columns: flow_cell_id"),
        ("flow_cell_id,barcode,alias,alias", "doubled columns: alias"),
    ],
)
def test_columns_are_checked_by_name(tmp_path: Path, head: str, words: str) -> None:
    with pytest.raises(SettingsError, match=rf"s\.csv:1: {words}"):
        read_sample_sheet(sheet(tmp_path / "s.csv", head=head))


def test_a_sheet_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"sample sheet .*none\.csv can't be read"):
        read_sample_sheet(tmp_path / "none.csv")
