"""SAM and CRAM, by htslib (pysam): made of BAM, and read back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pysam
from pysam.utils import SamtoolsError

from tasks.core.errors import InputError, SettingsError
from tasks.formats.layout import Kind


def convert_bam(source: Path, target: Path, kind: Kind, reference: Path | None) -> None:
    """Write a BAM file as SAM or CRAM; the same header and records.

    Args:
        reference: FASTA file that CRAM is compressed against.

    Raises:
        SettingsError: htslib refuses; says why.
    """
    options = ["-h"] if kind == "sam" else ["-C", "-T", str(reference)]
    try:
        pysam.view(*options, "--no-PG", "-o", str(target), str(source), catch_stdout=False)
    except SamtoolsError as error:
        against = f" against {reference}" if kind == "cram" else ""
        raise SettingsError(
            f"output.formats: {kind} can't be made of {source}{against}: {error}; what htslib says of it stands above; "
            "`shoal merge` takes another --reference, and other --formats"
        ) from error


def alignment_lengths(path: Path, reference: Path | None = None) -> Iterator[tuple[str, int]]:
    """Yield the id and the bases of each read of a SAM or CRAM file, once.

    Raises:
        InputError: it can't be read.
    """
    try:
        with _opened(path, reference) as file:
            for record in file.fetch(until_eof=True):
                if not (record.is_secondary or record.is_supplementary):
                    yield str(record.query_name), record.query_length
    except (OSError, ValueError) as error:
        raise InputError(str(path), "damaged", f"can't be read: {error}") from error


def _opened(path: Path, reference: Path | None) -> pysam.AlignmentFile:
    """Open a file without htslib's complaint that CRAM has no index: whoever reads all of it needs none."""
    before = pysam.set_verbosity(0)
    try:
        return pysam.AlignmentFile(str(path), check_sq=False, reference_filename=str(reference) if reference else None)
    finally:
        pysam.set_verbosity(before)
