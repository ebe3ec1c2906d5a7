"""The README is true: its commands run, its settings are known."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent

import pytest

from infra.site import load_site
from tasks.formats.replay import ReplaySettings, bundled_source, replay
from tasks.settings import resolve_settings
from tests.data import missing, program
from tests.making import write_pod5
from tests.slurm import free_ports

ROOT = Path(__file__).parents[1]
#: Indented blocks, without their comments.
BLOCKS = [
    re.sub(r" +#.*", "", block).strip("\n")
    for block in re.findall(r"(?:(?<=\n\n)(?:    .*\n)+)", (ROOT / "README.md").read_text("utf-8"))
]
LINES = [line.strip() for block in BLOCKS for line in block.splitlines()]


def need_the_bundled_read() -> None:
    if find_spec("pybasecall_client_lib") is None:
        missing("ont-pybasecall-client-lib, in which a read of real signal ships, is not installed")


def test_the_make_targets_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {line.split()[1] for line in LINES if line.startswith("make ")}
    assert named >= {"demo", "test"}
    assert all(f"\n{target}:" in makefile for target in named)


def test_the_settings_are_known(tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if "[engine]" in block)
    file = tmp_path / "run.toml"
    file.write_text("\n".join(line.removeprefix("    ") for line in block.splitlines()))
    resolve_settings(file=file, environment={}, command_line={"input": (tmp_path,), "out": tmp_path / "out"})


def test_the_site_is_known(tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if "[dorado]" in block)
    (tmp_path / "lab.toml").write_text("\n".join(line.removeprefix("    ") for line in block.splitlines()))
    assert load_site(str(tmp_path / "lab.toml")).dorado.program == "/opt/ont/dorado"


def test_what_confines_a_site_is_known(tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if "roots = " in block)
    (tmp_path / "lab.toml").write_text('name = "lab"\n' + dedent(block))
    site = load_site(str(tmp_path / "lab.toml"))
    assert (site.roots, site.umask) == ((Path("/data"), Path("/calls")), "0027")


def test_options_named_with_a_site_are_known(tmp_path: Path) -> None:
    given = [line.split() for line in LINES if line.startswith("shoal run") and "--site" in line]
    assert given
    for words in given:
        done = subprocess.run(
            [Path(sys.executable).with_name("shoal"), "plan", tmp_path, *words[3:]],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert "nknown option" not in done.stdout + done.stderr


def test_the_commands_run_in_order(tmp_path: Path, prefect_url: str) -> None:
    need_the_bundled_read()
    list(replay([bundled_source()], tmp_path / "DATA", ReplaySettings(reads=4, mean_samples=8_000)))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    commands = [line for line in LINES if re.match(r"shoal .*(DATA|OUT)|python -c", line)]
    assert len(commands) >= 5
    for command in commands:
        if "--site" not in command:
            done = subprocess.run(
                command, shell=True, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
            )
            assert done.returncode == 0, command + done.stdout + done.stderr


def test_the_site_file_is_known(tmp_path: Path) -> None:
    (block,) = (block for block in BLOCKS if "[split]" in block)
    file = tmp_path / "site.toml"
    file.write_text(dedent(block))
    assert load_site(str(file)).split.most_workers == 12


@pytest.mark.slurm
def test_the_commands_of_the_testbed(tmp_path: Path, prefect_url: str) -> None:
    (block,) = (block for block in BLOCKS if "slurm-testbed" in block)
    program("sbatch")
    write_pod5(tmp_path / "DATA" / "one.pod5", [25_000] * 20)
    (tmp_path / "infra").symlink_to(ROOT / "infra")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with TemporaryDirectory(prefix="slurm-") as state:
        environment = {**os.environ, "PATH": path, "TESTBED": f"{state}/s", "TESTBED_PORT": str(free_ports(5))}
        done = subprocess.run(
            ["bash", "-c", f"trap infra/slurm-testbed/down EXIT; set -e\n{dedent(block)}"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every read has one fate" in done.stdout


def test_the_demo(tmp_path: Path, prefect_url: str) -> None:
    need_the_bundled_read()
    done = subprocess.run(
        [Path(sys.executable).with_name("shoal"), "demo", "--out", tmp_path / "demo"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "every read has one fate" in done.stdout
    assert re.search(r"reads in\s+│ 300", done.stdout)
    assert "Error" not in done.stderr
