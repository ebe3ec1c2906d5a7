"""What we write, read by the programs that people read it with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import polars as pl
import pysam
import pytest

from tests.data import missing, program, shared
from tests.test_pipeline import run, settings

pytestmark = pytest.mark.readback
POD5 = Path(sys.executable).with_name("pod5")


def sources() -> list[Path]:
    """Return real reads of two runs."""
    return [shared("data", "r10_4khz", f"{name}.pod5") for name in ("sq_f5c_reads", "dorado_multi_filtered")]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of real reads with real calls."""
    given = settings(*sources(), out=tmp_path_factory.mktemp("readback") / "out", engine="cpu", batch_samples=1_000_000)
    run(given)
    return given.out


@pytest.fixture(scope="module")
def ledger(out: Path) -> pl.DataFrame:
    return pl.read_parquet(out / "ledger.parquet")


def ask(command: list[str | Path]) -> str:
    """Run a program; return what it says, and expect that it warns of nothing."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warn" not in done.stderr.lower(), done.stderr
    return done.stdout


def reader(name: str) -> Path:
    """Return a program that lives in an environment of its own."""
    path = Path(sys.prefix, "readers", name.lower(), "bin", name)
    if not path.exists():
        missing(f"{name} is not installed: `make test` sets it up")
    return path


def largest_summary(out: Path) -> Path:
    """Return the summary of the run with the most reads: NanoPlot wants more than a handful."""
    return max(out.rglob("sequencing_summary*.txt"), key=lambda path: path.stat().st_size)


def test_pod5_view_names_the_ledgers_reads(ledger: pl.DataFrame) -> None:
    listed = ask([POD5, "view", "--ids", "--no-header", *sources()]).split()
    assert sorted(listed) == sorted(ledger["read_id"])


def test_samtools_and_htslib_read_the_fastq(out: Path, ledger: pl.DataFrame, tmp_path: Path) -> None:
    names, bases = [], 0
    for file in out.rglob("fastq_*/*.fastq.gz"):
        assert pysam.BGZFile(str(file)).read(1) == b"@"
        with pysam.FastxFile(str(file)) as records:
            for record in records:
                names.append(record.name)
                bases += len(record.sequence or "")
                assert len(record.get_quality_array()) == len(record.sequence or "")
        ask([program("samtools"), "import", "-0", file, "-o", tmp_path / "made.bam"])
        ask([program("samtools"), "quickcheck", "-u", tmp_path / "made.bam"])
    assert sorted(names) == sorted(ledger.filter(fate="called")["read_id"])
    assert bases == ledger["bases"].sum()


def test_nanoplot_agrees_on_the_yield(out: Path, ledger: pl.DataFrame, tmp_path: Path) -> None:
    summary = largest_summary(out)
    ask([reader("NanoPlot"), "--summary", summary, "--no_static", "--tsv_stats", "-o", tmp_path])
    told = dict(line.split("\t", 1) for line in (tmp_path / "NanoStats.txt").read_text().splitlines())
    here = pl.read_csv(summary, separator="\t")
    assert float(told["number_of_reads"]) == here.height
    assert float(told["number_of_bases"]) == here["sequence_length_template"].sum()
    assert float(told["mean_qual"]) == pytest.approx(here["mean_qscore_template"].mean(), abs=0.5)


def test_toulligqc_reads_the_summary(out: Path, tmp_path: Path) -> None:
    summary = largest_summary(out)
    ask([reader("toulligqc"), "-a", summary, "--force", "-o", tmp_path / "report.html"])
    assert "report" in (tmp_path / "report.html").read_text().lower()
