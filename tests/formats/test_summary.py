from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core.errors import InputError
from tasks.formats.summary import COLUMNS, validate_summary
from tests.data import SHARED, shared

DORADO = sorted(path.name for path in SHARED.glob("data/dorado_bam/*.sequencing_summary.txt")) or ["none"]
ID = "00000000-0000-4000-8000-000000000001"
#: Values that a column allows, where `1` is not one.
RIGHT = {
    "parent_read_id": ID,
    "read_id": ID,
    "run_id": ID,
    "passes_filtering": "TRUE",
    "end_reason": "signal_positive",
    "type": "test_sample",
    "barcode_variant": "n/a",
    "alignment_direction": "+",
    "duplex_parent_template": "-",
    "duplex_parent_complement": ID,
}
#: A value that a column refuses, where `-3` is not one.
WRONG = {column.name: "two words" for column in COLUMNS if column.pattern("minknow-1.1").fullmatch("-3")}
PROFILES = {"minknow-1.1": "online", "dorado-1.4": "offline"}


@pytest.mark.parametrize("name", DORADO)
def test_every_row_that_dorado_wrote_passes(name: str) -> None:
    assert list(validate_summary(shared("data", "dorado_bam", name))) == []


def table(folder: Path, profile: str, **changed: str) -> Path:
    """Write a table with all columns of a profile and one row."""
    names = [c.name for c in COLUMNS if c.group not in set(PROFILES.values()) - {PROFILES[profile]}]
    values = [changed.get(name, RIGHT.get(name, "1")) for name in names]
    path = folder / "summary.txt"
    path.write_text("\t".join(names) + "\n" + "\t".join(values) + "\n")
    return path


@pytest.mark.parametrize("profile", PROFILES)
def test_a_wrong_value_in_any_column_is_found(profile: str, tmp_path: Path) -> None:
    assert list(validate_summary(table(tmp_path, profile))) == []
    checked = 0
    for column in COLUMNS:
        if column.group in {"online", "offline"} and column.group != PROFILES[profile]:
            continue
        wrong = WRONG.get(column.name, "-3")
        (found,) = validate_summary(table(tmp_path, profile, **{column.name: wrong}))
        assert (found.line, found.column, found.value) == (2, column.name, wrong)
        assert column.name in str(found)
        checked += 1
    assert checked == len([c for c in COLUMNS if c.group not in set(PROFILES.values()) - {PROFILES[profile]}])


@pytest.mark.parametrize(
    ("edit", "column", "says"),
    [
        pytest.param(lambda t: t.replace("channel\t", "chanel\t"), "chanel", "specification", id="unknown column"),
        pytest.param(lambda t: t.replace("channel\tmux", "mux\tchannel"), "", "order", id="wrong order"),
        pytest.param(lambda t: t.replace("alias\t", "").replace("\t1\n", "\n"), "alias", "part", id="half a group"),
        pytest.param(lambda t: t.replace("\n", "\textra\n", 2).replace("\textra", "", 1), "", "values", id="ragged"),
    ],
)
def test_a_wrong_header_is_found(edit: object, column: str, says: str, tmp_path: Path) -> None:
    path = table(tmp_path, "minknow-1.1")
    path.write_text(edit(path.read_text()))  # type: ignore[operator]
    assert any(found.column == column and says in str(found) for found in validate_summary(path))


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "summary.txt").touch()
    with pytest.raises(InputError, match="no header"):
        list(validate_summary(tmp_path / "summary.txt"))
