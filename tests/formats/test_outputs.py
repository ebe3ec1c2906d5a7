from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tasks.formats.outputs import CallFile, Place


def test_a_part_written_is_an_error_though_there_is_room_again(tmp_path: Path) -> None:
    """A write that crosses the limit writes what fits, as on a disk that fills; then another makes room."""
    file = CallFile(tmp_path / "run0.pass.fastq.gz", Place(0, "fastq", True, ""), None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            file.write(bytes(300_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.path.stat().st_size == 1000
