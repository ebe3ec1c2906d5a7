from __future__ import annotations

import pytest

from tasks.core.calls import BasecalledRead, EngineIdentity
from tasks.formats.fastq import FastqFormatter, HeaderProfile, timestamp
from tests.making import read, run_info

CPU = EngineIdentity(engine="cpu", version="1", model="minnow-v6", model_digest="", stride=3)
GPU = EngineIdentity(engine="dorado", version="1", model="hac@v5", model_digest="", stride=6, gpu="NVIDIA_H200")
ID = "00000000-0000-4000-8000-000000000001"
CALL = BasecalledRead(
    read_id=ID, parent_read_id=ID, sequence=b"ACGT", qstring=b"++++", mean_qscore=10.0, stride=3, num_samples=5000
)
SPLIT = BasecalledRead(
    read_id="00000000-0000-4000-8000-0000000000ff",
    parent_read_id=ID,
    sequence=b"AC",
    qstring=b"++",
    mean_qscore=10.0,
    stride=3,
    num_samples=2500,
    split_point=2500,
)
RUN = "11111111-2222-4333-8444-555555555555"


@pytest.mark.parametrize(
    ("profile", "identity", "call", "header"),
    [
        pytest.param(
            "minknow",
            CPU,
            CALL,
            f"{ID} runid={RUN} ch=17 start_time=2026-11-22T08:30:02.000+00:00 flow_cell_id=FAX12345 "
            f"protocol_group_id=experiment_1 sample_id=sample-7 parent_read_id={ID} "
            "basecall_model_version_id=minnow-v6",
            id="minknow",
        ),
        pytest.param(
            "minknow",
            GPU,
            SPLIT,
            f"{SPLIT.read_id} runid={RUN} ch=17 start_time=2026-11-22T08:30:02.500+00:00 flow_cell_id=FAX12345 "
            f"protocol_group_id=experiment_1 sample_id=sample-7 parent_read_id={ID} "
            "basecall_model_version_id=hac@v5 basecall_gpu=NVIDIA_H200",
            id="minknow, half of a read, on a GPU",
        ),
        pytest.param(
            "dorado",
            CPU,
            CALL,
            f"{ID}\tRG:Z:{RUN}_minnow-v6\tst:Z:2026-11-22T08:30:02.000000+00:00\tqs:f:10\tch:i:17"
            "\tPU:Z:FAX12345\tDT:Z:2026-11-22T08:30:00.000000+00:00",
            id="dorado",
        ),
    ],
)
def test_headers(profile: HeaderProfile, identity: EngineIdentity, call: BasecalledRead, header: str) -> None:
    record = FastqFormatter(run_info(), identity, profile).record(read(), call).decode()
    assert record == f"@{header}\n{call.sequence.decode()}\n+\n{call.qstring.decode()}\n"


@pytest.mark.parametrize("profile", ["minknow", "dorado"])
def test_missing_metadata_is_unknown_and_never_made_up(profile: HeaderProfile) -> None:
    bare = run_info(
        acquisition_start_time=None, protocol_run_id="", flow_cell_id="", experiment_name="", sample_id=" \t"
    )
    header = FastqFormatter(bare, CPU, profile).record(read(), CALL).decode().splitlines()[0]
    assert "unknown" in header
    assert not {"start_time=", "st:Z:", "DT:Z:", "1970"} & set(header.replace("=", "= ").split())
    assert "1970" not in header


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0, "1970-01-01T00:00:00.000+00:00"),
        (1_700_000_059_999, "2023-11-14T22:14:19.999+00:00"),
        (1_709_164_800_000, "2024-02-29T00:00:00.000+00:00"),
    ],
)
def test_timestamp(milliseconds: int, text: str) -> None:
    assert timestamp(milliseconds) == text
