"""The command line's own errors: one line that names what is wrong, and the exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from io import BufferedWriter, BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from deployments import cli, install
from deployments import serve as serving
from tests.making import write_pod5
from tests.test_pipeline import run, settings

SHOAL = Path(sys.executable).with_name("shoal")


def shoal(*arguments: str | Path) -> int:
    """Run the command line in this process; return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["shoal", *map(str, arguments)])
        patch.setattr(os, "environ", {"COLUMNS": "1000", **os.environ})  # what it changes there ends with it
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that this process is in, and that is its home; `shoal serve` starts nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(serving, "spawn", None)
    return tmp_path


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


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """Run the command line here, expect that it refuses, and return what it says."""
    assert shoal(*words) == cli.Exit.WRONG_SETTINGS
    return capsys.readouterr().err.removeprefix("shoal: ")


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
        assert "was not barcoded when it was called" in refused(capsys, words[0], given.out, *words[1:])
    for path in (stored, runs) if words[0] != "demux" else (runs,):
        whole = path.read_bytes()
        path.unlink() if damage == "gone" else path.write_bytes(whole[:-5])
        said = refused(capsys, words[0], given.out, *words[1:])
        assert said.startswith(str(path) if damage == "cut" or path == stored else f"{given.out} holds no plan yet")
        path.write_bytes(whole)


@pytest.mark.parametrize("level", ["chatty", "10"])
def test_a_log_level_that_is_none(
    level: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHOAL_LOG_LEVEL", level)
    assert shoal("models") == 2
    assert (
        capsys.readouterr().err == f"shoal: SHOAL_LOG_LEVEL: '{level}' is no level; give DEBUG, INFO, WARNING, ERROR\n"
    )


def test_a_log_level_in_any_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pod5(tmp_path / "one.pod5", [5_000])
    monkeypatch.setenv("SHOAL_LOG_LEVEL", "Error")
    assert shoal("plan", tmp_path, "--engine", "null") == 0


@pytest.mark.parametrize("port", ["99999", "0", "-1"])
@pytest.mark.parametrize(("command", "option"), [("run", "metrics-port"), ("serve", "metrics-port"), ("serve", "port")])
def test_a_port_that_is_none(
    in_folder: Path, command: str, option: str, port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shoal(command, in_folder, "--out", "out", f"--{option}", port) == 2
    assert f'Invalid value "{port}" for --{option}. Must be' in " ".join(capsys.readouterr().err.split())
    assert not list(in_folder.iterdir())


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_colons_in_a_path_are_no_picture(
    in_folder: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    """Rich would write a cross."""
    write_pod5(in_folder / "a:x:b" / "good.pod5", [5_000])
    (in_folder / "a:x:b" / "bad.pod5").touch()
    assert shoal("plan", in_folder, "--engine", "null", *options) == 0
    told = capsys.readouterr()
    assert f"{in_folder}/a:x:b/bad.pod5" in (told.out if options else told.err)


def test_files_may_settle_at_once(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder is not there: that is all that is wrong."""
    assert shoal("watch", "nowhere", "--out", "out", "--settled-for", "0", "--idle-after", "1s") == 2
    assert capsys.readouterr().err == "shoal: folders: nowhere is no folder\n"


@pytest.mark.parametrize("command", ["serve", "deploy"])
@pytest.mark.parametrize("cron", ["garbage", "", "R 6 * * *"])
def test_a_schedule_that_is_none(
    in_folder: Path, command: str, cron: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_folder / "data").mkdir()
    monkeypatch.setattr(install, "_prefect", None)
    assert shoal(command, "data", "--out", "out", "--cron", cron) == 2
    assert capsys.readouterr().err.endswith(
        f"shoal: cron: {cron!r} is no schedule; give for example --cron '*/5 * * * *'\n"
    )


def test_a_terminal_that_lacks_our_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding="latin-1"))
    assert shoal("doctor") == 0
    assert rb"\u2713 shoal: " in written.getvalue()


@pytest.mark.parametrize("arguments", [("models",), ("models", "--json"), ("--version",)])
@pytest.mark.parametrize("unbuffered", [False, True])
def test_output_that_cannot_be_written(
    arguments: tuple[str, ...], unbuffered: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        output = TextIOWrapper(full if unbuffered else BufferedWriter(full), write_through=unbuffered)
        monkeypatch.setattr(sys, "stdout", output)
        assert shoal(*arguments) == 2
    assert capsys.readouterr().err == "shoal: standard output: No space left on device\n"
