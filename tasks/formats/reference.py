"""A reference genome (FASTA): what BAM headers and CRAM need to know of it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from isal import igzip

from tasks.core.errors import SettingsError


@lru_cache(maxsize=4)
def reference_sequences(path: Path) -> dict[str, int]:
    """Return the names and lengths, bases, of a FASTA file's sequences, in its order.

    Takes them from its index (`.fai`) where there is one that is not older; else reads the file, gzip or not.

    Raises:
        SettingsError: it can't be read, or is no FASTA.
    """
    index = path.with_name(f"{path.name}.fai")
    try:
        if index.exists() and index.stat().st_mtime >= path.stat().st_mtime:
            rows = [line.split("\t") for line in index.read_text("utf-8").splitlines()]
            return {row[0]: int(row[1]) for row in rows}
        return _scan(path)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise SettingsError(f"output.reference: {path} can't be read as FASTA: {error}") from error


def _scan(path: Path) -> dict[str, int]:
    lengths: dict[str, int] = {}
    name = ""
    opened = igzip.open(path, "rb") if _is_gzip(path) else path.open("rb")  # type: ignore[no-untyped-call]
    with opened as file:
        for line in file:
            if line[:1] == b">":
                name = line[1:].split(None, 1)[0].decode()
                lengths[name] = 0
            elif name:
                lengths[name] += len(line.strip())
            elif line.strip():
                raise ValueError("does not begin with '>'")
    if not lengths:
        raise ValueError("has no sequence")
    return lengths


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"
