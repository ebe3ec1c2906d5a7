"""The command line's own errors: one line that names what is wrong, and the exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.making import write_pod5

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
