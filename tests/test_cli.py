"""The command line's own errors: one line that names what is wrong, and the exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from deployments.cli import Exit, main
from tests.making import write_pod5
from tests.test_pipeline import run, settings

SHOAL = Path(sys.executable).with_name("shoal")


def test_it_tells_its_version() -> None:
    done = subprocess.run([SHOAL, "--version"], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.strip() == version("shoal")


@pytest.mark.parametrize(
    ("out", "named"),
    [
        ("a_file/out", "a_file/out/.shoal/settings.json: Not a directory"),
        ("x" * 300, f"{'x' * 300}: File name too long"),
        ("/proc/out", "/proc/out: No such file or directory"),  # refuses root, too
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_line(tmp_path: Path, out: str, named: str) -> None:
    write_pod5(tmp_path / "data" / "one.pod5", [5_000])
    (tmp_path / "a_file").touch()
    command = [SHOAL, "run", "data", "--out", out, "--engine", "null"]
    wide = {**os.environ, "COLUMNS": "1000"}
    done = subprocess.run(command, cwd=tmp_path, env=wide, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert named in done.stderr
    assert done.stderr.count("\n") == 1


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """Run the command line here, expect that it refuses, and return what it says."""
    monkeypatch.setattr(sys, "argv", ["shoal", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "WARNING")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == Exit.WRONG_SETTINGS
    return capsys.readouterr().err.removeprefix("shoal: ")


@pytest.mark.filterwarnings("ignore:Cyclopts application invoked")  # main takes its words from sys.argv
@pytest.mark.parametrize("damage", ["cut", "gone"])
@pytest.mark.parametrize(
    "words", [("merge",), ("resplit", "--min-qscore", "9"), ("demux", "--sample-sheet", "sheet.csv")]
)
def test_a_folder_without_whole_settings_or_plan_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str], damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sheet.csv").write_text("flow_cell_id,barcode,alias\nFAX12345,barcode01,one\n")
    given = settings(write_pod5(tmp_path / "one.pod5", [5_000]), out=tmp_path / "out")
    run(given)
    stored = given.out / ".shoal" / "settings.json"
    runs = given.out / ".shoal" / "plan" / "runs.json"
    if words[0] == "demux":
        assert "was not barcoded when it was called" in refused(monkeypatch, capsys, words[0], given.out, *words[1:])
    for path in (stored, runs) if words[0] != "demux" else (runs,):
        whole = path.read_bytes()
        path.unlink() if damage == "gone" else path.write_bytes(whole[:-5])
        said = refused(monkeypatch, capsys, words[0], given.out, *words[1:])
        assert said.startswith(str(path) if damage == "cut" or path == stored else f"{given.out} holds no plan yet")
        path.write_bytes(whole)
