"""Launch and merge killed at any moment: the next attempt ends in the same bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.launch import launch
from tasks.merge import merge
from tasks.settings import RunSettings
from tests.making import write_pod5
from tests.test_pipeline import call, check_from_outside, digests, run, settings

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    folder = tmp_path_factory.mktemp("crash")
    for seed in (1, 2, 3):
        write_pod5(folder / "data" / f"{seed}.pod5", [20_000] * 5, seed=seed)
    given = settings(folder / "data", out=folder / "undisturbed")
    run(given)
    return given


def die(stage: str, at: int, given: RunSettings) -> bool:
    """Run a stage in a process of its own; True when it died at the change named."""
    file = given.out.parent / "settings.json"
    file.write_text(given.model_dump_json())
    command = [sys.executable, "-m", "tests.crash", stage, str(at), str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 9), done.stderr
    return done.returncode == 9


@pytest.mark.parametrize("at", [0, 4, 9, 11])
def test_killed_in_launch(undisturbed: RunSettings, tmp_path: Path, at: int) -> None:
    given = undisturbed.model_copy(update={"out": tmp_path / "out"})
    assert die("launch", at, given)
    run(given)
    check_from_outside(given.out, *given.input)
    assert digests(given.out) == digests(undisturbed.out)


@pytest.mark.parametrize("at", [0, 1, 5, 10, 15, 25, 40])
def test_killed_in_merge(undisturbed: RunSettings, tmp_path: Path, at: int) -> None:
    given = undisturbed.model_copy(update={"out": tmp_path / "out"})
    launch(given)
    call(given)
    assert die("merge", at, given)
    merge(given)
    check_from_outside(given.out, *given.input)
    assert digests(given.out) == digests(undisturbed.out)


def test_killed_while_merging_again(undisturbed: RunSettings, tmp_path: Path) -> None:
    """With other choices, over a whole result: at no moment does half a result pass for a whole one."""
    shutil.copytree(undisturbed.out, tmp_path / "out")
    given = undisturbed.model_copy(update={"out": tmp_path / "out"})
    assert die("merge", 8, given)
    assert not (tmp_path / "out" / ".shoal" / "merged.json").exists()
    merge(given)
    assert digests(given.out) == digests(undisturbed.out)
