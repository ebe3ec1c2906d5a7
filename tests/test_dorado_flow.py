"""`shoal run --engine dorado-server` on a real Prefect server and Dask cluster, with a stand-in basecall server."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.formats.replay import ReplaySettings, bundled_source, replay
from tests import standins
from tests.commands import SHOAL, finished, started
from tests.data import library
from tests.infra.test_dorado_server import starts
from tests.infra.test_processes import gone
from tests.making import write_pod5
from tests.test_pipeline import check_from_outside, run, settings

READS = 62
#: Of the chemistry that the data is of, by its name; a stand-in calls with the embedded engine's all the same.
MODEL = "dna_r10.4_e8.1_hac@v3.4"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real signal, and two reads that are too short."""
    library("pybasecall_client_lib")  # it brings the read along
    folder = tmp_path_factory.mktemp("input")
    settings = ReplaySettings(reads=60, reads_per_file=20, mean_samples=6000, seed=2)
    for _ in replay([bundled_source()], folder, settings):
        pass
    write_pod5(folder / "short.pod5", [50, 99])
    return folder


@pytest.fixture(scope="module")
def by_cpu(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the embedded engine makes of the data, adapters and all: the server's stand-in cuts none off."""
    out = tmp_path_factory.mktemp("cpu") / "out"
    given = settings(data, out=out, engine="cpu")
    run(given.model_copy(update={"engine": given.engine.model_copy(update={"trim": "none"})}))
    found = sequences(out)
    assert len(found) == READS - 2
    return found


def site(folder: Path) -> Path:
    """Write a site of two workers that share one server; on a busy machine a stand-in is silent for seconds."""
    file = folder / "lab.toml"
    file.write_text(
        'name = "lab"\nworkers = 2\n[dorado]\n'
        f'server = "{standins.SERVER}"\nport = "{folder / "s"}"\nstart_within = 300\nstall_after = 15\n'
    )
    return file


def start(data: Path, folder: Path, **faults: Any) -> subprocess.Popen[str]:
    command = [SHOAL, "run", data, "--out", folder / "out", "--engine", "dorado-server", "--model", MODEL]
    command += ["--site", site(folder), "--batch-samples", "100000", "--formats", "fastq,bam", "--json"]
    environment = standins.environment(standins.control(folder, **faults))
    return started(command, environment=environment)


def sequences(out: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in out.rglob("fastq_*/**/*.fastq.gz"):
        lines = gzip.decompress(file.read_bytes()).decode().splitlines()
        for head, sequence in zip(lines[::4], lines[1::4], strict=True):
            read_id = head[1:].split()[0]
            assert read_id not in found
            found[read_id] = sequence
    return found


def check(process: subprocess.Popen[str], folder: Path, data: Path, expected: dict[str, str]) -> None:
    """The run is complete, nothing lost or doubled, and no server is left."""
    result = finished(process, 3)  # 3: complete, and the two short reads were skipped
    assert (result["reads"], result["called"], result["skipped"], result["quarantined"]) == (READS, READS - 2, 2, 0)
    assert sequences(folder / "out") == expected
    assert f"{READS} reads in" in check_from_outside(folder / "out", data)
    for server in starts(folder):
        assert gone(server["pid"])
    left = [process for process in psutil.process_iter(["cmdline"]) if str(folder) in (process.info["cmdline"] or [])]
    assert not left


@pytest.mark.parametrize("fault", ["die_after", "stop_after"])
def test_the_server_dies_or_hangs_in_mid_run(
    data: Path, by_cpu: dict[str, str], tmp_path: Path, prefect_url: str, fault: str
) -> None:
    """It does so itself, with half of the reads still to come: whoever looks from outside may come too late."""
    check(start(data, tmp_path, **{fault: READS // 2}), tmp_path, data, by_cpu)
    assert len(starts(tmp_path)) == 2


def test_connections_are_refused_in_mid_run(
    data: Path, by_cpu: dict[str, str], tmp_path: Path, prefect_url: str
) -> None:
    check(start(data, tmp_path, drop_after=READS // 2, refuse_next=1), tmp_path, data, by_cpu)
    assert list(tmp_path.glob("done-refuse_next-*"))
    assert len(starts(tmp_path)) == 1
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["engine"]["engine"] == "dorado-server"
    assert list((tmp_path / "out").rglob("bam_*/*.bam"))


def doctor(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [SHOAL, "doctor", "--engine", "dorado-server", "--site", site(folder), *arguments]
    environment = standins.environment(folder)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


@pytest.mark.parametrize(
    ("faults", "arguments", "status", "words"),
    [
        ({}, [], 0, ["7.13.6", "26.0.0", str(standins.SERVER), "give a model"]),
        ({}, ["--model", standins.MODEL], 0, ["Stand In 100", "1.2.3", "7.13.6+standin", "stride 6"]),
        ({"version": "7.9.8"}, ["--model", standins.MODEL], 2, ["7.9.8", "pip install", "==7.9.8"]),
        ({"refuse": "basecall_config_unavailable"}, ["--model", standins.MODEL], 2, ["engine.model"]),
    ],
)
def test_doctor(tmp_path: Path, faults: dict[str, Any], arguments: list[str], status: int, words: list[str]) -> None:
    standins.control(tmp_path, **faults)
    done = doctor(tmp_path, *arguments)
    assert done.returncode == status, done.stdout + done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    for word in words:
        assert word in said or word in said.replace(" ", ""), said
    for server in starts(tmp_path):
        assert gone(server["pid"])


def test_a_model_is_needed_before_anything_is_started(data: Path, tmp_path: Path) -> None:
    command = [SHOAL, "run", data, "--out", tmp_path / "out", "--engine", "dorado-server"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert "engine.model: dorado-server needs one" in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
