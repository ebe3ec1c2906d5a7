"""`shoal run --engine dorado` with a stand-in for the program: a real Prefect server and Dask cluster, real signal."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copy
from typing import Any

import polars as pl
import pysam
import pytest

from infra.preflight import examine
from infra.site import DoradoSite, Site
from tasks.formats.workspace import Workspace
from tasks.settings import EngineSettings
from tests.data import shared
from tests.standins.program import install
from tests.test_pipeline import check_from_outside, run, settings

SHOAL = Path(sys.executable).with_name("shoal")
MODEL = "dna_r10.4.1_e8.2_400bps_hac@v5.2.0"


def site_file(folder: Path, **dorado: str) -> Path:
    """Write a site of two workers that has the stand-in."""
    values = {"program": str(install(folder / "bin")), **dorado}
    lines = ['name = "here"', "workers = 2", "[dorado]", *(f'{key} = "{value}"' for key, value in values.items())]
    file = folder / "here.toml"
    file.write_text("\n".join(lines) + "\n")
    return file


def shoal_run(data: Path, out: Path, *more: object) -> Any:
    command = [SHOAL, "run", data, "--out", out, "--batch-samples", "500000", *more, "--json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def sequences(out: Path) -> dict[str, tuple[str, str]]:
    """Read all FASTQ under a run folder: sequence and qualities by read id."""
    found = {}
    for file in out.rglob("fastq_*/*.fastq.gz"):
        lines = gzip.decompress(file.read_bytes()).decode().splitlines()
        for at in range(0, len(lines), 4):
            found[lines[at].split()[0][1:]] = (lines[at + 1], lines[at + 3])
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real reads of three runs."""
    folder = tmp_path_factory.mktemp("input")
    for name in ("dorado_multi_filtered", "dorado_single_na24385", "remora_can_reads"):
        copy(shared("data", "r10_4khz", f"{name}.pod5"), folder)
    return folder


@pytest.fixture(scope="module")
def embedded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """What the embedded engine makes of the data."""
    out = tmp_path_factory.mktemp("embedded") / "out"
    run(settings(data, out=out, engine="cpu", batch_samples=500_000))
    return sequences(out)


def test_same_calls_as_the_embedded_engine(
    data: Path,
    embedded: dict[str, tuple[str, str]],
    tmp_path: Path,
    prefect_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also from a program that dies once in the middle."""
    out = tmp_path / "out"
    monkeypatch.setenv("STANDIN_FAULT", "exit")
    monkeypatch.setenv("STANDIN_AFTER", "5")
    monkeypatch.setenv("STANDIN_ONCE", str(tmp_path / "once"))
    result = shoal_run(
        data, out, "--engine", "dorado", "--site", site_file(tmp_path), "--formats", "fastq,bam", "--min-qscore", 9
    )
    assert (tmp_path / "once").exists()
    ledger = pl.read_parquet(out / "ledger.parquet")
    assert ledger["read_id"].n_unique() == ledger.height == result["reads"]
    check_from_outside(out, data)
    assert sequences(out) == embedded
    names = set()
    for file in out.rglob("bam_*/*.bam"):
        with pysam.AlignmentFile(str(file), check_sq=False) as opened:
            header = opened.header.to_dict()
            assert {group["ID"].endswith(f"_{MODEL}") for group in header["RG"]} == {True}
            assert (header["PG"][0]["PN"], header["PG"][0]["VN"]) == ("dorado", "1.4.0+standin")
            names |= {record.query_name for record in opened}
    assert names == set(sequences(out))
    engine = json.loads(Workspace(out).provenance.read_text())["engine"]
    assert (engine["version"], engine["model"], engine["gpu"]) == ("1.4.0+standin", MODEL, "Stand_In")


@pytest.mark.parametrize(
    ("changes", "wrong", "words"),
    [
        (lambda folder: {"models": folder}, set(), "1.4.0+standin"),
        (lambda folder: {"program": "no-such-dorado"}, {"dorado", "engine dorado"}, "is not there, or can't be run"),
        (lambda folder: {"models": folder / "none"}, {"dorado models"}, "dorado download --models-directory"),
    ],
)
def test_doctor(
    changes: Callable[[Path], dict[str, object]],
    wrong: set[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "models" / MODEL).mkdir(parents=True)
    given = {"program": str(install(tmp_path / "bin")), "models": tmp_path / "models", **changes(tmp_path / "models")}
    site = Site(name="here", workers=9, scratch=tmp_path, dorado=DoradoSite(**given))
    findings = examine(site, EngineSettings(kind="dorado"))
    assert {finding.subject for finding in findings if finding.fatal} == wrong
    assert any(words in finding.text for finding in findings)
    assert any(finding.subject == "devices" for finding in findings)
    assert any("9 for 2 processes of dorado" in finding.text for finding in findings)
