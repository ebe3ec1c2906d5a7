"""References: lengths by index, by scan, and of what is none."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pysam
import pytest

from tasks.core.errors import SettingsError
from tasks.formats.reference import reference_sequences, refuse_for_cram

FASTA = b">chr1 first\nACGT\nAC\n\n>chr2\nA\n"


def test_lengths_by_scan_and_by_index(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.fa", tmp_path / "a.fa.gz"
    plain.write_bytes(FASTA)
    packed.write_bytes(gzip.compress(FASTA))
    assert reference_sequences(plain) == reference_sequences(packed) == {"chr1": 6, "chr2": 1}
    indexed = tmp_path / "b.fa"
    indexed.write_bytes(FASTA)
    index = tmp_path / "b.fa.fai"
    index.write_text("chr1\t6\t12\t4\t5\n")
    assert reference_sequences(indexed) == {"chr1": 6}
    stale = tmp_path / "c.fa"
    stale.write_bytes(FASTA)
    index.rename(tmp_path / "c.fa.fai")
    os.utime(tmp_path / "c.fa.fai", (0, 0))
    assert list(reference_sequences(stale)) == ["chr1", "chr2"]


@pytest.mark.parametrize("content", [None, b"", b"ACGT\n", b">\n"])
def test_what_is_no_fasta_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.fa"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"output\.reference: .*a\.fa can't be read as FASTA"):
        reference_sequences(path)


def test_what_cram_cannot_be_compressed_against(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed, blocked = (tmp_path / name for name in ("a.fa", "b.fa.gz", "c.fa.gz"))
    plain.write_bytes(FASTA)
    packed.write_bytes(gzip.compress(FASTA))
    pysam.tabix_compress(str(plain), str(blocked))
    for path in (plain, blocked):
        refuse_for_cram(path)
    with pytest.raises(SettingsError, match=r"b\.fa\.gz is packed by gzip, .*--formats without cram"):
        refuse_for_cram(packed)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for path in (plain, blocked):
        with pytest.raises(SettingsError, match=rf"{path.name} has no {path.name}\.fai beside it"):
            refuse_for_cram(path)
    (tmp_path / "a.fa.fai").touch()
    refuse_for_cram(plain)
