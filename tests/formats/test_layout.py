from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.formats.layout import LONGEST, path_part, reads_name, run_folder, summary_name
from tests.making import run_info


def test_names_are_minknows() -> None:
    run = run_info()
    assert run_folder(run) == PurePosixPath("experiment_1/sample-7/20261122_0830_2A_FAX12345_11111111")
    assert (
        str(reads_name(run, "fastq", passes=True, batch=3)) == "fastq_pass/FAX12345_pass_11111111_01234567_3.fastq.gz"
    )
    barcoded = reads_name(run, "bam", passes=False, batch=0, barcode="barcode07", marker="null")
    assert str(barcoded) == "bam_fail/barcode07/FAX12345_fail_barcode07_11111111_01234567_null_0.bam"
    assert summary_name(run, "null") == "sequencing_summary_null_FAX12345_11111111_01234567.txt"


def test_missing_metadata_is_unknown() -> None:
    run = run_info(
        acquisition_start_time=None,
        protocol_start_time=None,
        protocol_run_id="",
        flow_cell_id="",
        experiment_name="",
        sample_id="",
        sequencer_position="",
    )
    assert run_folder(run) == PurePosixPath("unknown/unknown/unknown_unknown_unknown_unknown")


@pytest.mark.parametrize(
    ("text", "part"),
    [("../../etc", "_.._etc"), ("a/b\\c", "a_b_c"), (".hidden", "hidden"), (" lab 7\n", "lab_7"), ("...", "unknown")],
)
def test_path_part(text: str, part: str) -> None:
    assert path_part(text) == part


def test_long_names_are_cut_and_stay_apart() -> None:
    longest = "x" * LONGEST
    assert path_part(longest) == longest
    parts = [path_part("é" * 300 + end) for end in ("", "a", "b")]
    assert len(set(parts)) == 3
    assert {part[:45] for part in parts} == {"é" * 45}
    name = reads_name(run_info(flow_cell_id="é" * 300), "fastq", passes=True, batch=100_000, barcode="x" * 40)
    assert max(len(part.encode()) for part in name.parts) < 220


@given(st.text() | st.text(min_size=LONGEST))
def test_no_text_leaves_its_folder(text: str) -> None:
    part = path_part(text)
    assert part
    assert not part.startswith(".")
    assert len(PurePosixPath(part).parts) == 1
    assert len(part.encode()) <= LONGEST
