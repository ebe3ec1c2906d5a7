"""A reference genome (FASTA): what BAM headers and CRAM need to know of it."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from isal import igzip

from tasks.core.errors import SettingsError

#: How a gzip file begins, and what is 12 bytes on in bgzip's.
GZIP, BGZF = b"\x1f\x8b", b"BC"


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


def refuse_for_cram(path: Path) -> None:
    """Raise SettingsError when htslib can't compress against a FASTA file: it needs an index, and puts it beside it."""
    with path.open("rb") as file:
        head = file.read(14)
    packed = head[:2] == GZIP
    needed = [f"{path.name}.fai", *([f"{path.name}.gzi"] if packed else [])]
    missing = [name for name in needed if not path.with_name(name).exists()]
    if packed and head[12:14] != BGZF:
        cause = "is packed by gzip, and CRAM takes it packed by bgzip or not at all"
    elif missing and not os.access(path.parent, os.W_OK):
        cause = f"has no {missing[0]} beside it, as `samtools faidx` makes it, and its folder can't be written"
    else:
        return
    raise SettingsError(
        f"output.reference: {path} {cause}; give another --reference, or --formats without cram (to `shoal merge`, "
        "when all is called)"
    )


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
        return file.read(2) == GZIP
