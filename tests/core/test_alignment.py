"""Alignments: columns worked out by hand, and lines that are no SAM."""

from __future__ import annotations

import pytest

from tasks.core.alignment import alignment_figures, parse_sam_line, reverse_complement


def line(cigar: str, *tags: str, flag: int = 0, position: int = 101, sequence: str = "*") -> str:
    return "\t".join(["r", str(flag), "chr1", str(position), "60", cigar, "*", "0", "0", sequence, "*", *tags])


@pytest.mark.parametrize(
    ("cigar", "tags", "correct"),
    [
        ("3S10M2I5M4D5M1S", ["MD:Z:7A7^ACGT1C3", "NM:i:8"], 18),
        ("3S7=1X2=2I5=4D1=1X3=1S", [], 18),
        ("3S10M2I5M4D5M1S", ["NM:i:8"], 18),
        ("3S10M2I5M4D5M1S", [], 20),
    ],
)
def test_columns_by_md_by_cigar_and_by_nm(cigar: str, tags: list[str], correct: int) -> None:
    figures = alignment_figures(
        [line(cigar, "AS:i:31", "bh:i:2", *tags, flag=16), line("5M", flag=256), line("5M", flag=2048 + 16)]
    )
    assert figures is not None
    assert (figures.genome, figures.direction) == ("chr1", "-")
    assert (figures.genome_start, figures.genome_end) == (100, 124)
    assert (figures.strand_start, figures.strand_end) == (3, 25)
    assert (figures.num_insertions, figures.num_deletions, figures.num_aligned) == (2, 4, 20)
    assert figures.num_correct == correct
    assert figures.identity == correct / 20
    assert figures.accuracy == correct / 26
    assert figures.coverage == 22 / 26
    assert (figures.score, figures.bed_hits, figures.mapping_quality) == (31, 2, 60)
    assert (figures.num_alignments, figures.num_secondary_alignments, figures.num_supplementary_alignments) == (3, 1, 1)


def test_an_unmapped_read_has_none() -> None:
    assert alignment_figures(["r\t4\t*\t0\t0\t*\t*\t0\t0\tACGT\t!!!!"]) is None
    assert alignment_figures([]) is None


@pytest.mark.parametrize(("text", "words"), [("r\t0\tchr1", "not 3"), (line("5Q"), "not a CIGAR: '5Q'")])
def test_what_is_not_sam_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_sam_line(text)


def test_reverse_complement_of_dna_and_rna() -> None:
    assert reverse_complement(b"AACGTN") == b"NACGTT"
    assert reverse_complement(b"ACGU") == b"ACGT"
