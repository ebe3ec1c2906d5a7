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
        ('kind = "slurm"', ["kind", "slurm", "local"]),
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
