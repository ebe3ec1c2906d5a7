"""The run folder's own files, on file systems that have ways of their own."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tasks.formats.workspace import read_json


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_file_that_another_node_replaced_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def read(path: Path, encoding: str) -> str:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "read_text", read)
    if number == errno.ESTALE:
        assert read_json(tmp_path / "beat.json") is None
    else:
        with pytest.raises(OSError, match="beat"):
            read_json(tmp_path / "beat.json")
