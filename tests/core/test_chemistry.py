from __future__ import annotations

import pod5
import pytest

from tasks.core.chemistry import Chemistry, Fits, chemistry_of, mismatch
from tasks.formats.pod5 import Unreadable, read_rows
from tests.data import shared
from tests.making import run_info

FITS = Fits(molecule="dna", pores=("R10.4.1", "R10.4"), speeds=(400,), sample_rates=(4000, 5000))


@pytest.mark.parametrize(
    ("flow_cell", "kit", "expected"),
    [
        ("FLO-PRO114M", "sqk-lsk114", ("dna", "R10.4.1", 400)),
        ("FLO-MIN114", "SQK-LSK114", ("dna", "R10.4.1", 400)),
        ("FLO-FLG114HD", "SQK-LSK114-XL", ("dna", "R10.4.1", 400)),
        ("FLO-PRO114", "SQK-NBD114-96-260", ("dna", "R10.4.1", 260)),
        ("FLO_PRO114", "SQK_NBD114_96_260", ("dna", "R10.4.1", 260)),
        ("FLO-PRO112", "sqk-q20ea", ("dna", "R10.4", 400)),
        ("FLO-MIN106", "SQK-LSK109", ("dna", "R9.4.1", 450)),
        ("FLO-MIN107", "SQK-LSK109", ("dna", "R9.4.1", 450)),
        ("FLO-PRO001", "SQK-LSK109", ("dna", "R9.4.1", 450)),
        ("FLO-PRO002M", "SQK-LSK110", ("dna", "R9.4.1", 450)),
        ("FLO-PRO002", "sqk-rna002", ("rna", "R9.4.1", 70)),
        ("FLO-MIN004RA", "SQK-RNA004", ("rna", "RNA004", 130)),
        ("FLO-PRO004RA", "", ("rna", "RNA004", 130)),
        ("", "sqk-lsk108", ("dna", "R9.4.1", 450)),
        ("", "sqk-lsk110", ("dna", "R9.4.1", 450)),
        ("", "sqk-lsk112", ("dna", "R10.4", 400)),
        ("", "sqk-rbk114.24", ("dna", "R10.4.1", 400)),
        ("", "sqk-rna004", ("rna", "RNA004", 130)),
        ("FLO-XYZ999", "sqk-lsk114", ("dna", "R10.4.1", 400)),
        ("", "sqk-lsk1140", ("dna", None, None)),
        ("", "", ("dna", None, None)),
    ],
)
def test_chemistry_from_codes(flow_cell: str, kit: str, expected: tuple[str, str | None, int | None]) -> None:
    molecule, pore, speed = expected
    run = run_info(flow_cell_product_code=flow_cell, sequencing_kit=kit)
    assert chemistry_of(run) == Chemistry(molecule=molecule, pore=pore, speed=speed, sample_rate=5000)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"selected_speed_bases_per_second": "260"}, ("dna", "R10.4.1", 260)),
        ({"selected_speed_bases_per_second": ""}, ("dna", "R10.4.1", 400)),
        ({"selected_speed_bases_per_second": "0"}, ("dna", "R10.4.1", 400)),
        ({"experiment_type": "rna"}, ("dna", "R10.4.1", 400)),
    ],
)
def test_tags_of_an_r10_run(tags: dict[str, str], expected: tuple[str, str, int]) -> None:
    chemistry = chemistry_of(run_info(context_tags=tuple(tags.items())))
    assert (chemistry.molecule, chemistry.pore, chemistry.speed) == expected


def test_experiment_type_tells_rna_on_r9() -> None:
    rna = run_info(flow_cell_product_code="FLO-MIN106", sequencing_kit="", context_tags=(("experiment_type", "rna"),))
    assert chemistry_of(rna).molecule == "rna"


@pytest.mark.parametrize(
    ("protocol", "pore", "speed"),
    [
        ("sequencing/sequencing_PRO114_DNA_e8_2_400K:FLO-PRO114M:SQK-LSK114:400", "R10.4.1", 400),
        (r"sequencing\sequencing_MIN106_DNA:FLO-MIN106:SQK-LSK109:False", "R9.4.1", 450),
        ("c449127e3461a521e0865fe6a88716f6f6b0b30c", None, None),
    ],
)
def test_protocol_name_helps_where_codes_are_missing(protocol: str, pore: str | None, speed: int | None) -> None:
    run = run_info(flow_cell_product_code="", sequencing_kit="", tracking_id=(("exp_script_name", protocol),))
    assert (chemistry_of(run).pore, chemistry_of(run).speed) == (pore, speed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"flow_cell_product_code": "FLO-MIN106"}, "has pore R9.4.1", id="pore"),
        pytest.param({"flow_cell_product_code": "FLO-PRO004RA"}, "is RNA", id="molecule"),
        pytest.param({"sequencing_kit": "SQK-LSK114-260"}, "ran at 260 bases/s", id="speed"),
        pytest.param({"sample_rate": 3012}, "sampled at 3012 Hz", id="sample rate"),
        pytest.param(
            {"flow_cell_product_code": "", "sequencing_kit": ""}, "no flow cell code, no kit", id="nothing told"
        ),
    ],
)
def test_mismatch_names_the_run_and_what_is_wrong(changes: dict[str, object], words: str) -> None:
    sentence = mismatch(run_info(**changes), FITS, "minnow")
    assert sentence is not None
    assert "run 01234567" in sentence
    assert "model minnow" in sentence
    assert words in sentence


@pytest.mark.parametrize("folder", ["r10_4khz", "r10_5khz", "r9_4khz", "rna004", "edge"])
def test_real_files(folder: str) -> None:
    for path in sorted(shared("data", folder).glob("*.pod5")):
        fitting = folder.startswith("r10") or path.name == "dorado_meta_5khz_HD.pod5"
        with pod5.Reader(path) as reader:
            rows = reader.num_reads
        for read in read_rows(str(path), 0, rows):
            assert not isinstance(read, Unreadable)
            assert (mismatch(read.run, FITS, "minnow") is None) == fitting, path.name


def test_what_the_user_says_counts_for_runs_that_do_not_tell() -> None:
    silent = run_info(flow_cell_product_code="", sequencing_kit="")
    assert "--chemistry" in (mismatch(silent, FITS, "model") or "")
    assert mismatch(silent, FITS, "model", "dna_r10.4.1_400bps") is None
    assert "is RNA" in (mismatch(silent, FITS, "model", "rna004_130bps") or "")
    telling = run_info(flow_cell_product_code="FLO-MIN106", sequencing_kit="sqk-lsk109")
    assert "pore R9.4.1" in (mismatch(telling, FITS, "model", "dna_r10.4.1_400bps") or "")
