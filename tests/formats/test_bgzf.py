from __future__ import annotations

import gzip
import io
import random
from pathlib import Path

import pysam
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.errors import InputError
from tasks.formats.bgzf import EOF_BLOCK, PAYLOAD, BgzfWriter, block, join


def compressed(*pieces: bytes) -> bytes:
    file = io.BytesIO()
    writer = BgzfWriter(file)
    for piece in pieces:
        writer.write(piece)
    writer.close()
    writer.close()
    return file.getvalue()


@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(1, 1500))
@settings(max_examples=50)
def test_round_trip_whatever_the_pieces(pieces: list[bytes], times: int) -> None:
    assert gzip.decompress(compressed(*[piece * times for piece in pieces])) == b"".join(p * times for p in pieces)


@pytest.mark.parametrize("size", [0, 1, PAYLOAD - 1, PAYLOAD, PAYLOAD + 1, 3 * PAYLOAD])
def test_htslib_reads_and_seeks(size: int, tmp_path: Path) -> None:
    text = bytes(i % 251 for i in range(size))
    path = tmp_path / "x.gz"
    path.write_bytes(compressed(text))
    with pysam.BGZFile(str(path)) as file:
        assert file.read(size + 1) == text
        if size > PAYLOAD:
            file.seek(0)
            file.read(PAYLOAD + 1)
            here = file.tell()
            rest = file.read()
            file.seek(here)
            assert file.read() == rest


def test_data_that_does_not_compress_still_fits_a_block() -> None:
    noise = random.Random(1).randbytes(PAYLOAD)
    packed = block(noise)
    assert len(packed) <= 0x10000
    assert gzip.decompress(packed) == noise


def test_files_join_without_recompression(tmp_path: Path) -> None:
    texts = [b"one\n" * 20_000, b"", b"three\n"]
    parts = []
    for i, text in enumerate(texts):
        parts.append(tmp_path / f"{i}.gz")
        parts[-1].write_bytes(compressed(text))
    joined = io.BytesIO()
    join(parts, joined)
    assert gzip.decompress(joined.getvalue()) == b"".join(texts)
    assert joined.getvalue().count(EOF_BLOCK) == 1
    assert joined.getvalue().startswith(parts[0].read_bytes()[: -len(EOF_BLOCK)])


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[: len(EOF_BLOCK) - 1], lambda b: b""])
def test_a_truncated_part_is_named(damage: object, tmp_path: Path) -> None:
    path = tmp_path / "cut.gz"
    path.write_bytes(damage(compressed(b"text")))  # type: ignore[operator]
    with pytest.raises(InputError, match=r"cut\.gz.*end-of-file"):
        join([path], io.BytesIO())
