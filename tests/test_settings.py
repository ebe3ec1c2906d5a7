from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tasks.core.errors import SettingsError
from tasks.settings import RunSettings, checked, resolve_settings
from tasks.watch_settings import WatchSettings, resolve_watch


@pytest.fixture(name="given")
def _given(tmp_path: Path) -> dict[str, Any]:
    return {"input": [tmp_path], "out": tmp_path / "out"}


def resolve(given: dict[str, Any], text: str = "", **environment: str) -> RunSettings:
    file = Path(given["input"][0]) / "run.toml"
    file.write_text(text)
    return resolve_settings(file=file, environment=environment, command_line=given)


def test_command_line_wins_over_environment_over_file(given: dict[str, Any]) -> None:
    text = "batch_samples = 300000\nrounds = 2\n[engine]\nkind = 'null'\nrate = 5e6"
    settings = resolve({**given, "rounds": 7}, text, SHOAL_ROUNDS="5", SHOAL_ENGINE__RATE="1e6", HOME="/nowhere")
    assert (settings.rounds, settings.batch_samples) == (7, 300_000)
    assert (settings.engine.kind, settings.engine.rate, settings.engine.threads) == ("null", 1e6, 1)


def test_environment_gives_several_inputs(given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    paths = os.pathsep.join([str(tmp_path), str(tmp_path / "a")])
    settings = resolve_settings(
        file=None, environment={"SHOAL_INPUT": paths, "SHOAL_OUT": str(tmp_path / "out")}, command_line={}
    )
    assert settings.input == (tmp_path, tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("batch_sample = 1", r"batch_sample: unknown key; known here: .*batch_samples", id="unknown key"),
        pytest.param("[engine]\nmodle = 'x'", r"engine\.modle: unknown key; known here: kind, model", id="nested"),
        pytest.param("batch_samples = 5", r"batch_samples: 5 .*greater than or equal to 100000", id="too small"),
        pytest.param("[engine]\nkind = 'gpu'", r"engine\.kind: 'gpu' .*'cpu'", id="not a choice"),
        pytest.param("[output]\nmin_qscore = 99", r"output\.min_qscore: 99 .*60", id="too large"),
        pytest.param("strict = 'perhaps'", r"strict: 'perhaps' .*bool", id="not a truth value"),
        pytest.param("engine = 'null'", r"engine: 'null' should be a table, \[engine\] kind = …", id="no table"),
        pytest.param("output = 5", r"output: 5 should be a table, \[output\] min_qscore = …", id="no table, number"),
        pytest.param("rounds = ", r"run\.toml.*is not TOML: Invalid value", id="not TOML"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(text: str, says: str, given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=says):
        resolve(given, text)


@pytest.mark.parametrize("command_line", [{}, {"engine": {}, "output": {}}, {"engine": {"kind": "cpu"}}])
@pytest.mark.parametrize(
    ("text", "environment"),
    [
        ("engine = 'null'", {}),
        ("", {"SHOAL_ENGINE": "null"}),
        ("[engine]\nthreads = 2", {"SHOAL_ENGINE": "null"}),
        ("", {"SHOAL_ENGINE__THREADS": "2", "SHOAL_ENGINE": "null"}),
    ],
)
def test_what_is_no_table_is_not_overlooked(
    given: dict[str, Any], text: str, environment: dict[str, str], command_line: dict[str, Any]
) -> None:
    with pytest.raises(SettingsError, match=r"^engine: 'null' should be a table, "):
        resolve({**given, **command_line}, text, **environment)
    if not environment:
        file = given["input"][0] / "run.toml"
        with pytest.raises(SettingsError, match=r"^engine: 'null' should be a table, "):
            resolve_watch(file=file, command_line={"folders": given["input"], "out": given["out"], **command_line})


def test_all_mistakes_are_told_at_once(given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve(given, "rounds = 0\ncolour = 'red'")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"input": ["/not/here"]}, "input: /not/here is not there"),
        ({"input": []}, "input: .*at least 1"),
        ({"out": None}, "out"),
    ],
)
def test_paths_are_checked(changed: dict[str, Any], says: str, given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=says):
        resolve_settings(file=None, environment={}, command_line={**given, **changed})


BAD = Path(os.fsdecode(b"caf\xe9"))


@pytest.mark.parametrize(
    ("model", "changed", "named"),
    [
        (RunSettings, {"out": BAD}, "out"),
        (RunSettings, {"out": str(BAD)}, "out"),
        (RunSettings, {"input": [BAD]}, "input"),
        (RunSettings, {"output": {"reference": BAD}}, "output.reference"),
        (WatchSettings, {"out": BAD}, "out"),
        (WatchSettings, {"folders": [BAD]}, "folders"),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_a_path_that_is_not_utf8_is_refused(
    model: type[BaseModel],
    changed: dict[str, Any],
    named: str,
    there: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No table could name it; nor, before, could the message that it is not there."""
    monkeypatch.chdir(tmp_path)
    if there:
        BAD.mkdir()
    given = {"input" if model is RunSettings else "folders": [tmp_path], "out": tmp_path / "out"}
    with pytest.raises(SettingsError, match=rf"^{named}: '.*/caf\\udce9' is not UTF-8"):
        checked(model, {**given, **changed})


def test_a_settings_file_that_is_not_there(given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"'/not/here\.toml' can't be read: No such file"):
        resolve_settings(file=Path("/not/here.toml"), environment={}, command_line=given)


def test_digest_follows_what_decides_the_bases(given: dict[str, Any]) -> None:
    plain = resolve(given)
    assert plain.digest() == resolve(given, "rounds = 2\nsite = 'elsewhere'").digest()
    assert plain.digest() != resolve(given, "batch_samples = 100000").digest()


def test_every_field_tells_its_title() -> None:
    models: list[Any] = [RunSettings]
    for model in models:
        for name, field in model.model_fields.items():
            assert field.title, f"{model.__name__}.{name}"
            if hasattr(field.annotation, "model_fields"):
                models.append(field.annotation)
    assert len(models) == 3
