"""Sites by name and by file; what is wrong in one is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from infra.site import Site, load_site
from tasks.core.errors import SettingsError


def test_the_bundled_site_is_this_machine() -> None:
    site = load_site("local")
    assert (site.name, site.kind) == ("local", "local")
    assert site.workers == len(os.sched_getaffinity(0))


def test_a_site_file(tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    file.write_text('name = "lab"\nworkers = 3\nslots = 2\nmemory_gb = 16\nscratch = "/scratch"\n')
    site = load_site(str(file))
    assert site == Site(name="lab", workers=3, slots=2, memory_gb=16, scratch=Path("/scratch"))


@pytest.mark.parametrize(("slots", "in_all"), [(None, 8), (1, 4), (3, 12)])
def test_the_site_decides_on_slots_before_the_engine_does(slots: int | None, in_all: int) -> None:
    assert Site(name="lab", workers=4, slots=slots).slots_in_all(2) == in_all


def test_a_site_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_site("local").workers = 2  # type: ignore[misc]


@pytest.mark.parametrize("name", ["mars", "mars.toml", ""])
def test_an_unknown_site_lists_the_known_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="local") as caught:
        load_site(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("workers = 0", ["workers", "0", "1"]),
        ('workers = "many"', ["workers", "many", "integer"]),
        ("slots = 99", ["slots", "99", "16"]),
        ("memory_gb = -1", ["memory_gb", "-1", "0"]),
        ("gpus = 4", ["gpus", "workers"]),
        ('kind = "cloud"', ["kind", "cloud", "slurm", "local"]),
        ("[split]\nmaximum = 3", ["[split]", "slurm"]),
        ('umask = "rwx"', ["umask", "rwx", "[0-7]"]),
        ('roots = ["data"]', ["roots", "data", "whole path"]),
        ("workers =", ["lab.toml"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, line: str, words: list[str]) -> None:
    file = tmp_path / "lab.toml"
    file.write_text(f'name = "lab"\n{line}\n')
    with pytest.raises(SettingsError) as caught:
        load_site(str(file))
    said = str(caught.value)
    assert str(file) in said
    for word in words:
        assert word in said, said


SLURM = """
name = "cluster"
kind = "slurm"
interface = "ib0"
[launch]
walltime = "10:00"
[split]
threads = 7
memory_per_thread_gb = 2
walltime = "02:00:00"
account = "lab"
total_threads = 42
[[split.pools]]
partition = "h100"
gres = "gpu:H100:1"
maximum = 4
[[split.pools]]
partition = "a100"
gres = "gpu:A100:1"
maximum = 8
walltime = 1
"""


def test_a_slurm_site(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(SLURM)
    site = load_site(str(file))
    assert site.launch is not None
    assert site.launch.walltime_seconds == 600
    assert site.merge is None
    assert [(pool.partition, pool.account, pool.threads, pool.walltime_seconds) for pool in site.split.each] == [
        ("h100", "lab", 7, 7200),
        ("a100", "lab", 7, 86_400),
    ]
    assert site.split.most_workers == 6  # of the 12 that the pools may have, by their threads
    assert site.slots_in_all(2) == 12


def test_the_defaults_of_a_slurm_site() -> None:
    split = Site(name="cluster", kind="slurm").split
    (pool,) = split.each
    assert (pool.threads, pool.memory_per_thread_gb, pool.walltime, pool.gres) == (1, 4, "1-00:00:00", None)
    assert (split.total_threads, split.minimum, split.most_workers) == (0, 0, 4)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('walltime = "1h"', ["split.walltime", "'1h'", "dd-hh:mm:ss"]),
        ("threads = 7\ntotal_threads = 6", ["total_threads", "6", "7 threads that one task needs"]),
        ("minimum = 9", ["minimum", "9", "4 workers"]),
        ('extra = ["#SBATCH --qos=long"]', ["split.extra", "no option of sbatch"]),
        ("gpus = 4", ["split.gpus", "gres"]),
        ('[[split.pools]]\npartition = "a"\nmaximum = 0', ["split.pools.0.maximum", "0"]),
        ("[[split.pools]]\ngpus = 1", ["split.pools.0.gpus", "gres"]),
        ("[launch]\ngpus = 1", ["launch.gpus", "gres"]),
        ("[engine]\n", ["engine", "unknown key", "interface"]),
    ],
)
def test_what_is_wrong_in_a_slurm_site_is_named(tmp_path: Path, line: str, words: list[str]) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(f'name = "cluster"\nkind = "slurm"\n[split]\n{line}\n')
    with pytest.raises(SettingsError) as caught:
        load_site(str(file))
    for word in words:
        assert word in str(caught.value), str(caught.value)
