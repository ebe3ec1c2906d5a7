"""BGZF: gzip in blocks of at most 64 KiB, so that htslib can seek in it and files join without recompression.

Format: SAM specification, section 4.1 "The BGZF compression format". Deflate by isal at level 1: 20 times cheaper than
zlib's default for 1.5 % more bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from isal import igzip_lib, isal_zlib

from tasks.core.errors import InputError

#: The empty block that ends a BGZF file.
EOF_BLOCK = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
#: Uncompressed bytes per block; htslib's own figure, which leaves room for data that does not compress.
PAYLOAD = 0xFF00
#: gzip header with the extra field BC, whose value is the size of the block less 1.
_HEADER = struct.Struct("<4sIBBH2sHH")
#: Bytes of the header that isal writes, without an extra field; and of the trailer: CRC and length.
_PLAIN_HEADER = 10
_TRAILER = 8
#: What isal raises for data that is not deflate.
DeflateError: type[Exception] = isal_zlib.error  # type: ignore[assignment]  # its stubs say an instance


class Writable(Protocol):
    """What a BgzfWriter writes into."""

    def write(self, data: bytes, /) -> int: ...


class BgzfWriter:
    """Compresses into a binary file. Small writes are gathered; `close` ends the BGZF stream, not the file."""

    def __init__(self, file: Writable) -> None:
        self._file = file
        self._rest = b""
        self._closed = False

    def write(self, data: bytes) -> None:
        """Add bytes; whole blocks are written at once."""
        text = memoryview(self._rest + data)
        whole = len(text) // PAYLOAD * PAYLOAD
        self._rest = bytes(text[whole:])
        if whole:
            self._file.write(b"".join(block(text[at : at + PAYLOAD]) for at in range(0, whole, PAYLOAD)))

    def flush(self) -> None:
        """Write what is gathered, so that what comes next begins a block."""
        if self._rest:
            self._file.write(block(self._rest))
            self._rest = b""

    def close(self) -> None:
        """Write what is left and the end-of-file block. Harmless when called twice."""
        if self._closed:
            return
        self._closed = True
        self.flush()
        self._file.write(EOF_BLOCK)


def block(data: bytes | memoryview) -> bytes:
    """Compress up to PAYLOAD bytes into one BGZF block."""
    # As gzip, not bare deflate: isal takes the CRC while the data is at hand.
    tail = igzip_lib.compress(data, 1, igzip_lib.COMP_GZIP, igzip_lib.MEM_LEVEL_DEFAULT, 15)[_PLAIN_HEADER:]
    if _HEADER.size + len(tail) > 0x10000:  # data that grows: one stored deflate block
        tail = b"".join((b"\x01", struct.pack("<HH", len(data), len(data) ^ 0xFFFF), data, tail[-_TRAILER:]))
    return _HEADER.pack(b"\x1f\x8b\x08\x04", 0, 0, 0xFF, 6, b"BC", 2, _HEADER.size + len(tail) - 1) + tail


def read_block(file: BinaryIO) -> bytes:
    """Read and decompress the next block.

    Raises:
        EOFError: the file ends in it.
        ValueError: there is no block here.
    """
    head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise EOFError("ends within a block")
    magic, *_, extra, _, size = _HEADER.unpack(head)
    if magic != b"\x1f\x8b\x08\x04" or extra != b"BC":
        raise ValueError("no BGZF block")
    rest = file.read(size + 1 - _HEADER.size)
    try:
        return zlib.decompress(head + rest, wbits=31)
    except zlib.error as error:
        raise ValueError(str(error)) from error


def join(parts: Sequence[Path], target: BinaryIO, *, skip: Sequence[int] = ()) -> None:
    """Join BGZF files without recompression: each part's blocks, and one end-of-file block.

    Args:
        skip: Bytes, whole blocks, to leave out at each part's beginning; none when empty.

    Raises:
        InputError: a part does not end as a BGZF file does.
    """
    for part, start in zip(parts, skip or (0,) * len(parts), strict=True):
        left = part.stat().st_size - len(EOF_BLOCK) - start
        with part.open("rb") as file:
            file.seek(start)
            while left > 0:
                data = file.read(min(left, 1 << 20))
                if not data:
                    break
                target.write(data)
                left -= len(data)
            if file.read() != EOF_BLOCK:
                raise InputError(str(part), "truncated", "does not end in BGZF's end-of-file block")
    target.write(EOF_BLOCK)
