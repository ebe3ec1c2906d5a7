"""barcoding_summary.txt: the scores of demultiplexing, 19 columns, as buttery-eel writes them.

Recent basecallers tell neither the full arrangement nor ids and sequences of front and rear: these are `.`, as is any
other value that is not known.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import polars as pl

from tasks.formats.summary import Part, scan_parts, write_joined

COLUMNS = (
    "parent_read_id",
    "read_id",
    "barcode_arrangement",
    "barcode_full_arrangement",
    "barcode_kit",
    "barcode_variant",
    "barcode_score",
    "barcode_front_id",
    "barcode_front_score",
    "barcode_front_refseq",
    "barcode_front_foundseq",
    "barcode_front_foundseq_length",
    "barcode_front_begin_index",
    "barcode_rear_id",
    "barcode_rear_score",
    "barcode_rear_refseq",
    "barcode_rear_foundseq",
    "barcode_rear_foundseq_length",
    "barcode_rear_end_index",
)
_UNKNOWN = (
    "barcode_full_arrangement",
    "barcode_front_id",
    "barcode_front_refseq",
    "barcode_front_foundseq",
    "barcode_rear_id",
    "barcode_rear_refseq",
    "barcode_rear_foundseq",
)


def write_barcoding_summary(parts: Sequence[Part], groups: Collection[str], target: Path) -> None:
    """Join the parts of a run into its barcoding summary. Streams: memory does not grow with the rows.

    Args:
        groups: Optional groups of columns that any part has.
        target: Replaced as a whole.
    """
    unknown = [pl.lit(None, pl.String).alias(name) for name in _UNKNOWN]
    write_joined(
        parts, target, lambda some: scan_parts(some, groups).with_columns(unknown).select(COLUMNS), null_value="."
    )
