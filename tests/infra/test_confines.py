"""Paths outside a site's roots are refused by field, however they are named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from infra.confines import confine, umask_of
from infra.site import Site, load_site
from tasks.core.errors import SettingsError
from tasks.settings import RunSettings, resolve_settings
from tasks.watch_settings import WatchSettings


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    for name in ("data", "calls", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "elsewhere" / "ref.fa").write_text(">a\nACGT\n")
    (tmp_path / "lab.toml").write_text(f'name = "lab"\nroots = ["{tmp_path}/data", "{tmp_path}/calls"]\n')
    return tmp_path


def settings(lab: Path, **values: object) -> RunSettings:
    given = {"input": [lab / "data"], "out": lab / "calls" / "a", "site": str(lab / "lab.toml")}
    return RunSettings.model_validate({**given, **values})


def test_paths_inside_are_allowed(lab: Path) -> None:
    confine(settings(lab))


def test_a_site_without_roots_allows_all(lab: Path) -> None:
    confine(settings(lab, out=Path("/anywhere"), site="local"))


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("out", {"out": "{}/elsewhere/a"}),
        ("out", {"out": "{}/calls/../elsewhere/a"}),
        ("input", {"input": ["{}/data", "{}/elsewhere"]}),
        ("output.reference", {"output": {"reference": "{}/elsewhere/ref.fa"}}),
        ("engine.model", {"engine": {"model": "{}/elsewhere/model"}}),
    ],
)
def test_paths_outside_are_refused(lab: Path, field: str, values: dict[str, object]) -> None:
    folder = str(lab)

    def filled(value: object) -> object:
        if isinstance(value, dict):
            return {key: filled(one) for key, one in value.items()}
        return [filled(one) for one in value] if isinstance(value, list) else str(value).replace("{}", folder)

    with pytest.raises(SettingsError, match=rf"^{field}: .*outside .*site lab.*/data, .*/calls"):
        confine(settings(lab, **{key: filled(value) for key, value in values.items()}))


def test_links_are_followed(lab: Path) -> None:
    (lab / "calls" / "a").symlink_to(lab / "elsewhere")
    with pytest.raises(SettingsError, match="out: "):
        confine(settings(lab))


def test_lists_of_files_are_read(lab: Path) -> None:
    (lab / "elsewhere" / "1.pod5").touch()
    (lab / "data" / "files.txt").write_text("../elsewhere/1.pod5\n")
    with pytest.raises(SettingsError, match=r"input: .*1\.pod5 is outside"):
        confine(settings(lab, input=[lab / "data" / "files.txt"]))


def test_a_watch_is_confined_too(lab: Path) -> None:
    confine(WatchSettings(folders=(lab / "data",), out=lab / "calls", site=str(lab / "lab.toml")))
    with pytest.raises(SettingsError, match="folders: "):
        confine(WatchSettings(folders=(lab / "elsewhere",), out=lab / "calls", site=str(lab / "lab.toml")))


def test_no_other_site_where_one_confines_all(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CONFINED_TO", str(lab / "lab.toml"))
    confine(settings(lab))
    with pytest.raises(SettingsError, match=r"site: 'local' may not be named here; only .*lab\.toml"):
        confine(settings(lab, site="local"))
    monkeypatch.setenv("SHOAL_CONFINED_TO", "local")  # it has no roots
    confine(settings(lab, site="local"))


def test_what_serve_says_in_the_environment_is_no_setting_of_a_run(lab: Path) -> None:
    given = {"input": [lab], "out": lab / "out"}
    environment = {"SHOAL_CONFINED_TO": str(lab / "lab.toml"), "SHOAL_DATABASE": "postgresql://lab@db/shoal"}
    assert resolve_settings(file=None, environment=environment, command_line=given).site == "local"


def test_a_site_file_has_one_path_from_everywhere(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab)
    assert settings(lab, site="lab.toml").site == str(lab / "lab.toml")


def test_the_umask_holds_for_a_block(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with umask_of(Site(name="lab", umask="0007")):
            (tmp_path / "inside").touch()
        with umask_of(load_site("local")):
            (tmp_path / "after").touch()
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("inside", "after")] == [0o660, 0o644]
