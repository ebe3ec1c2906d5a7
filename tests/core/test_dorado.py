"""Rules about the basecall server, as tables."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.core.dorado import (
    GPU_BATCH,
    ModelSet,
    Patience,
    Pulse,
    ServerCounts,
    Verdict,
    Waiting,
    address_of,
    batch_warning,
    client_parameters,
    default_min_qscore,
    devices_of,
    fits_of,
    fixed_port,
    gpu_batch,
    gpus_of,
    judge,
    log_suffix,
    packaged,
    parse_version,
    port_warning,
    remedy,
    server_name,
    started_on,
    unfit,
    verdict,
    version_mismatch,
)
from tests.making import read, run_info

PATIENCE = Patience(base=300, slowest=100_000, stall=100, attempts=3)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("success", Verdict.GO_ON),
        ("queue_full", Verdict.GO_ON),
        ("no_connection", Verdict.RECONNECT),
        ("timed_out", Verdict.RECONNECT),
        ("not_accepting_reads", Verdict.RECONNECT),
        ("error_state", Verdict.RECONNECT),
        ("basecall_config_unavailable", Verdict.FAIL),
        ("barcode_kit_unavailable", Verdict.FAIL),
        ("bad_read", Verdict.QUARANTINE),
        ("a code of next year's", Verdict.FAIL),
    ],
)
def test_verdict(code: str, expected: Verdict) -> None:
    assert verdict(code) is expected


def test_what_fails_says_what_to_do() -> None:
    assert "engine.barcode_kits" in remedy("barcode_kit_unavailable")
    assert "'a code of next year's'" in remedy("a code of next year's").replace('"', "'")


def test_the_deadline_grows_with_the_read_and_with_what_is_ahead() -> None:
    assert PATIENCE.deadline(0, 0) == 300
    assert PATIENCE.deadline(1_000_000, 0) == 310
    assert PATIENCE.deadline(1_000_000, 40_000_000) == 710
    assert PATIENCE.stall_after(100_000_000) == 1100


BUSY, IDLE = ServerCounts(100, 40), ServerCounts(100, 100)


@pytest.mark.parametrize(
    ("silent", "server_silent", "counts", "overdue", "expected"),
    [
        (5, 5, BUSY, False, Pulse.FINE),
        (99, 99, BUSY, False, Pulse.FINE),
        (101, 101, BUSY, False, Pulse.STALLED),
        (101, 101, None, False, Pulse.STALLED),
        (101, 101, IDLE, False, Pulse.LOST),
        (101, 5, BUSY, False, Pulse.FINE),
        (5, 5, BUSY, True, Pulse.OVERDUE),
        (101, 5, BUSY, True, Pulse.SLOW),
        (401, 5, BUSY, True, Pulse.LOST),
    ],
)
def test_judge(
    silent: float, server_silent: float, counts: ServerCounts | None, overdue: bool, expected: Pulse
) -> None:
    waiting = Waiting(silent=silent, server_silent=server_silent, counts=counts, longest=0, overdue=overdue)
    assert judge(waiting, PATIENCE) is expected


def test_a_long_read_is_given_time() -> None:
    waiting = Waiting(silent=500, server_silent=500, counts=BUSY, longest=100_000_000, overdue=False)
    assert judge(waiting, PATIENCE) is Pulse.FINE


def test_counts_are_taken_as_far_as_they_are_told() -> None:
    assert ServerCounts.of({"lifetime_reads_in": 3, "lifetime_reads_out": 2}) == ServerCounts(3, 2)
    assert ServerCounts.of({}) is None


@pytest.mark.parametrize(
    ("server", "protocol", "fits"),
    [
        ("7.13.6", "26.0.0", True),
        ("7.13.6+4d7a9fe", "26.0.0", True),
        ("7.11.2+4d7a9fe", "23.0.0", False),
        ("7.13.5", "26.0.0", False),
        ("8.0.0", "27.0.0", False),
        ("8.13.6", "26.0.0", False),
        ("7.13.6", "25.0.0", False),
        ("", "", False),
    ],
)
def test_versions_are_compared_whole(server: str, protocol: str, fits: bool) -> None:
    """Not number by number: a rule made of `major >= 7 and minor >= 4` takes 8.0 for old."""
    told = version_mismatch(library=(7, 13, 6), library_protocol=(26, 0, 0), server=server, server_protocol=protocol)
    assert (told is None) == fits
    if told:
        assert "7.13.6" in told
        assert "pip install 'ont-pybasecall-client-lib==" in told


def test_versions_are_ordered_as_numbers() -> None:
    assert parse_version("7.9.8") < parse_version("7.11.2") < parse_version("8.0.0+1")


@pytest.mark.parametrize(
    ("arguments", "gpus", "expected"),
    [
        ((), 1, GPU_BATCH),
        ((), 4, 4 * GPU_BATCH),
        (("--chunk_size", "10000", "--batch_size", "1152"), 1, 11_520_000),
        (("--chunk_size=10000", "--batch_size=100", "--gpu_runners_per_device", "2"), 2, 4_000_000),
        (("--batch_size", "100"), 1, GPU_BATCH),
    ],
)
def test_gpu_batch(arguments: tuple[str, ...], gpus: int, expected: int) -> None:
    assert gpu_batch(arguments, gpus) == expected


def test_too_little_in_flight_is_warned_of_with_the_numbers() -> None:
    assert batch_warning(clients=4, window=40_000_000, batch=24_000_000) is None
    warning = batch_warning(clients=2, window=1_000_000, batch=12_000_000)
    assert warning is not None
    for number in ("2 clients", "1,000,000", "2,000,000", "12,000,000", "12,000,000 or more"):
        assert number in warning


@pytest.mark.parametrize(
    ("line", "port"),
    [
        ("Starting server on port: 5555\n", "5555"),
        ("2026-11-23 10:00:00 Starting server on port: ipc:///tmp/.guppy/5555\n", "ipc:///tmp/.guppy/5555"),
        ("Starting server on port: ERROR", None),
        ("Starting server on port:", None),
        ("Unable to find chunk benchmarks for GPU", None),
        ("", None),
    ],
)
def test_start_up_line(line: str, port: str | None) -> None:
    assert started_on(line) == port


def named(job: str = "", gpus: str = "", run: str = "/out", *started_as: str) -> str:
    environment = {"SLURM_JOB_ID": job, "CUDA_VISIBLE_DEVICES": gpus}
    set_ones = {name: value for name, value in environment.items() if value}
    return server_name(run=run, environment={"HOME": "/", **set_ones}, started_as=started_as)


def test_who_shares_a_server() -> None:
    assert named("7", "0") == named("7", "0")
    apart = [
        named(),
        named("7", "0"),
        named("8", "0"),  # under cgroups each job counts its GPUs from 0
        named("7", "1"),
        named("", "0"),
        named("", "0,1"),
        named("7", "0", "/other"),
        named("7", "0", "/out", "cuda:1"),
    ]
    assert len(set(apart)) == len(apart)
    assert named(run="/not-utf-8-\udcff") != named()


def test_logs_are_named_by_host_and_job() -> None:
    assert log_suffix("gpu3", {}) == "gpu3"
    assert log_suffix("gpu3", {"SLURM_JOB_ID": "7"}) == "gpu3.7"


def test_fixed_ports() -> None:
    assert fixed_port("auto") is None
    assert fixed_port("5555") == 5555
    assert fixed_port("/tmp/s") == Path("/tmp/s") == fixed_port("ipc:///tmp/s")
    assert port_warning("auto", servers=4) is port_warning("5555", servers=1) is None
    assert re.search(r"dorado\.port.* 5555, .* up to 4 servers.*leave it out", port_warning("5555", servers=4) or "")


def test_addresses() -> None:
    assert address_of("5555") == "127.0.0.1:5555"
    assert address_of("/tmp/a.sock") == "ipc:///tmp/a.sock"
    assert address_of("ipc:///tmp/a.sock") == "ipc:///tmp/a.sock"
    assert address_of("gpu3:5555") == "gpu3:5555"


HAC = "dna_r10.4.1_e8.2_400bps_hac@v5.2.0"


@pytest.mark.parametrize(
    ("model", "mods", "config", "arguments"),
    [
        (HAC, (), f"{HAC}||", ("--model", HAC)),
        (f"{HAC}||", (), f"{HAC}||", ("--model", HAC)),
        (
            HAC,
            ("5mC_5hmC@v1",),
            f"{HAC}|{HAC}_5mC_5hmC@v1|",
            ("--model", HAC, "--modbase_models", f"{HAC}_5mC_5hmC@v1"),
        ),
        (
            f"/m/{HAC}|/m/a,/m/b|/m/d",
            (),
            f"/m/{HAC}|/m/a,/m/b|/m/d",
            ("--model", f"/m/{HAC}", "--modbase_models", "/m/a,/m/b"),
        ),
        (
            "dna_r10.4.1_e8.2_400bps_5khz_hac.cfg",
            (),
            "dna_r10.4.1_e8.2_400bps_5khz_hac",
            ("--config", "dna_r10.4.1_e8.2_400bps_5khz_hac.cfg"),
        ),
    ],
)
def test_model_sets(model: str, mods: tuple[str, ...], config: str, arguments: tuple[str, ...]) -> None:
    models = ModelSet.parse(model, mods)
    assert models.config == config
    assert models.server_arguments == arguments


def test_half_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="one bar"):
        ModelSet.parse("a|b")
    with pytest.raises(ValueError, match="lacks its version"):
        ModelSet.parse(HAC, ("5mC_5hmC",))


NOTHING: dict[str, Any] = {
    "name": "shoal",
    "moves": False,
    "mods": False,
    "trim": "all",
    "barcode_kits": (),
    "barcodes": (),
    "barcode_both_ends": False,
    "barcode_trim": True,
    "poly_a": False,
    "poly_a_config": None,
    "reference": None,
    "bed": None,
    "duplex": False,
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"trim_adapters": True, "trim_primers": True, "move_enabled": False}),
        ({"trim": "adapters"}, {"trim_adapters": True, "trim_primers": False}),
        ({"trim": "none"}, {"trim_adapters": False, "trim_primers": False}),
        ({"moves": True}, {"move_enabled": True}),
        ({"mods": True}, {"move_enabled": True}),
        (
            {"barcode_kits": ("A", "B"), "barcodes": ("barcode01",), "barcode_both_ends": True},
            {
                "barcode_kits": ["A", "B"],
                "barcode_list": ["barcode01"],
                "require_barcodes_both_ends": True,
                "enable_trim_barcodes": True,
            },
        ),
        ({"reference": "/r.fa", "bed": "/b.bed"}, {"align_ref": "/r.fa", "bed_file": "/b.bed"}),
        ({"poly_a": True, "poly_a_config": "/p"}, {"estimate_poly_a": True, "poly_a_config": "/p"}),
        ({"duplex": True}, {"pair_by_channel": True}),
    ],
)
def test_parameters(given: dict[str, Any], expected: dict[str, Any]) -> None:
    made = client_parameters(**{**NOTHING, **given})
    assert {key: made[key] for key in expected} == expected
    assert not set(client_parameters(**NOTHING)) & {"barcode_kits", "align_ref", "pair_by_channel", "estimate_poly_a"}


@pytest.mark.parametrize(
    ("model", "qscore", "fits"),
    [
        (HAC, 9, ("dna", "R10.4.1", 400, 5000)),
        ("dna_r10.4.1_e8.2_400bps_fast@v4.1.0", 8, ("dna", "R10.4.1", 400, 4000)),
        ("dna_r10.4.1_e8.2_260bps_sup@v4.1.0", 10, ("dna", "R10.4.1", 260, 4000)),
        ("dna_r10.4.1_e8.2_400bps_5khz_fast", 8, ("dna", "R10.4.1", 400, 5000)),
        ("dna_r10.4.1_e8.2_400bps_hac", 9, ("dna", "R10.4.1", 400, 4000)),
        ("dna_r9.4.1_450bps_hac", 9, ("dna", "R9.4.1", 450, 4000)),
        ("dna_r9.4.1_e8_sup@v3.3", 10, ("dna", "R9.4.1", 450, 4000)),
        ("rna004_130bps_sup@v5.1.0", 10, ("rna", "RNA004", 130, 4000)),
        ("rna002_70bps_fast@v3", 8, ("rna", "R9.4.1", 70, 3000)),
        ("our_own_model", 9, None),
        ("breakfast", 9, None),
    ],
)
def test_what_a_name_tells(model: str, qscore: float, fits: tuple[str, str, int, int] | None) -> None:
    assert default_min_qscore(model) == qscore
    found = fits_of(model)
    told = None if found is None else (found.molecule, found.pores[0], found.speeds[0], found.sample_rates[0])
    assert told == fits


def test_a_read_is_packaged_as_the_library_wants_it() -> None:
    """The kit goes with it: without, the server can't trim adapters and primers."""
    made = packaged(read(200, calibration_offset=-10, calibration_scale=1), 7)
    assert made["sequencing_kit"] == "sqk-lsk114"
    assert {type(made[key]) for key in ("daq_offset", "daq_scaling", "sampling_rate")} == {float}
    assert made["read_tag"] == 7
    assert made["raw_data"].dtype == np.int16
    assert "sequencing_kit" not in packaged(read(200, run=run_info(sequencing_kit="")), 7)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"signal": np.zeros(5, np.float32)}, "float32"),
        ({"signal": np.zeros((5, 2), np.int16)}, "2 dimensions"),
        ({"calibration_scale": float("nan")}, "calibration scale is nan"),
        ({"calibration_offset": float("inf")}, "calibration offset is inf"),
        ({"run": run_info(sample_rate=0)}, "sample rate is 0 Hz"),
        ({"start_sample": -1}, "starts at sample -1"),
    ],
)
def test_an_unfit_read_is_told(changes: dict[str, Any], words: str) -> None:
    assert unfit(read(200)) is None
    assert words in (unfit(replace(read(200), **changes)) or "")


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        (None, "cuda:all"),
        ("0", "cuda:0"),
        ("2,3", "cuda:0,1"),
        ("GPU-8f2a, MIG-77", "cuda:0,1"),
        ("", "cpu"),
        ("-1", "cpu"),
        ("NoDevFiles", "cpu"),
    ],
)
def test_devices(visible: str | None, devices: str) -> None:
    assert devices_of(visible) == devices


@pytest.mark.parametrize(("device", "gpus"), [("cuda:all", 1), ("cuda:0", 1), ("cuda:0,1,3", 3), ("cpu", 1)])
def test_gpus(device: str, gpus: int) -> None:
    assert gpus_of(device) == gpus
