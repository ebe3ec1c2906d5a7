"""The run folder's own files, on file systems that have ways of their own."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tasks.core.errors import InputError
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


@pytest.mark.parametrize("content", [b"", b'{"digest": "a', b"\xff\xfe"])
def test_a_file_that_is_not_whole_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(InputError, match=r"/settings\.json: is not whole .*; restore it"):
        read_json(tmp_path / "settings.json")
