"""Verify: what a crash of the machine or of its disk left of a file is a fault that it tells, no error of its own."""

from __future__ import annotations

import gzip
import random
import shutil
from pathlib import Path

import pytest

from tasks.formats.workspace import Workspace
from tasks.settings import RunSettings
from tasks.verify import verify
from tests.making import write_pod5
from tests.test_outputs import run
from tests.test_pipeline import settings


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    folder = tmp_path_factory.mktemp("verify")
    write_pod5(folder / "data" / "one.pod5", [20_000] * 14, seed=1)
    return run(settings(folder / "data", out=folder / "out", output={"formats": "fastq,bam,sam"}))


@pytest.mark.parametrize("damage", ["emptied", "cut", "zeroed", "garbled"])
@pytest.mark.parametrize(
    "name",
    [
        "ledger.parquet",
        "sequencing_summary*",
        "output_hash*",
        "*.fastq.gz",
        "*.bam",
        "*.sam",
        "provenance.json",
        ".shoal/plan/reads.parquet",
    ],
)
def test_every_damage_is_a_fault(whole: RunSettings, tmp_path: Path, name: str, damage: str) -> None:
    workspace = Workspace(tmp_path / "out")
    shutil.copytree(whole.out, workspace.out)
    assert verify(workspace).faults == []
    victim = next(path for path in sorted(workspace.out.glob(f"**/{name}")) if "committed" not in path.parts)
    content = victim.read_bytes()
    chance = random.Random(1)
    for _ in range(1 if damage == "emptied" else 12):
        at = chance.randrange(1, len(content) - 1)
        rest = {"cut": b"", "zeroed": bytes(len(content) - at), "garbled": b"\xff\x00\t,\n" * 9, "emptied": b""}[damage]
        victim.write_bytes(content[: 0 if damage == "emptied" else at] + rest)
        assert verify(workspace).faults, at


def test_calls_without_an_id_are_a_fault(whole: RunSettings, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out")
    shutil.copytree(whole.out, workspace.out)
    victim = next(workspace.out.glob("*/*/*/fastq_*/*/*.fastq.gz"))
    for header in (b"@", b"@ \t", b"@read1", b"@\xff\xfe"):
        victim.write_bytes(gzip.compress(header + b"\nA\n+\nI\n"))
        assert any(fault.startswith(f"{victim}: ") for fault in verify(workspace).faults), header


def test_other_lengths_in_the_summary_are_a_fault_in_every_kind_of_file(whole: RunSettings, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out")
    shutil.copytree(whole.out, workspace.out)
    (summary,) = workspace.out.glob("*/*/*/sequencing_summary*")
    header, first, *rest = summary.read_text().splitlines()
    values = first.split("\t")
    values[header.split("\t").index("sequence_length_template")] = "7"
    summary.write_text("\n".join((header, "\t".join(values), *rest)) + "\n")
    faults = verify(workspace).faults
    assert [fault.split(":")[0] for fault in faults] == [f"{kind} and summary" for kind in ("FASTQ", "BAM", "SAM")]
    assert all("1 reads are not as long in both" in fault for fault in faults)
