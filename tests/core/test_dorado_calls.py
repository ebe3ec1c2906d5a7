"""What the basecall server returns, as calls: dicts in the form that the published library gives them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tasks.core.calls import Outcome
from tasks.core.dorado_calls import modified_bases, outcome_of
from tests.making import read

READ = read(5000)
PLAIN: dict[str, Any] = {"stride": 6, "moves": False, "mods": False, "barcodes": False, "poly_a": False}


def answer(sequence: str = "ACGTCC", *, sub_tag: int = 0, datasets: Any = None, **metadata: Any) -> dict[str, Any]:
    return {
        "read_tag": 1,
        "sub_tag": sub_tag,
        "metadata": {"read_id": READ.read_id, **metadata},
        "datasets": {"sequence": sequence, "qstring": "5" * len(sequence), **(datasets or {})},
    }


def outcome(*answers: dict[str, Any], **changes: Any) -> Outcome:
    return outcome_of(READ, answers, **{**PLAIN, **changes})


def test_a_call_with_hardly_any_metadata() -> None:
    (call,) = outcome({"read_tag": 1, "datasets": {"sequence": "ACGT", "qstring": "5555"}}).calls
    assert call.read_id == call.parent_read_id == READ.read_id
    assert call.mean_qscore == pytest.approx(20)
    assert (call.stride, call.num_samples, call.split_point, call.duplex) == (6, 5000, 0, 0)


def test_what_the_metadata_tells() -> None:
    (call,) = outcome(
        answer(
            mean_qscore=12.5,
            model_stride=5,
            trimmed_samples=100,
            trimmed_duration=4900,
            duration=5000,
            scaling_median=80.0,
            scaling_med_abs_dev=9.0,
            scaling_version="pa",
            split_point=-1,
            open_pore_level=float("nan"),
        )
    ).calls
    assert (call.mean_qscore, call.stride, call.trimmed_samples, call.num_samples) == (12.5, 5, 100, 5000)
    assert (call.scaling_midpoint, call.scaling_dispersion, call.scaling_version) == (80.0, 9.0, "pa")


def test_split() -> None:
    """Parts know their parent and where they begin; a part's time of start follows from that, not from the parent's."""
    made = outcome(
        answer("GGTT", sub_tag=1, strand_id="b", split_point=3000, duration=2000),
        answer("ACG", strand_id="a", split_point=0, duration=2900, trimmed_samples=50, trimmed_duration=2850),
    )
    first, second = made.calls
    assert [(call.read_id, call.split_point, call.num_samples) for call in made.calls] == [
        ("a", 0, 2900),
        ("b", 3000, 2000),
    ]
    assert {call.parent_read_id for call in made.calls} == {READ.read_id}
    assert (first.end_reason(READ), second.end_reason(READ)) == ("unknown", READ.end_reason)


def test_a_part_without_an_id_always_gets_the_same() -> None:
    ids = [[c.read_id for c in outcome(answer(sub_tag=1, split_point=9), answer()).calls] for _ in range(2)]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([], "no answer"),
        ([answer(sub_tag=0), answer(sub_tag=0)], "1 read and 0 split off are not the 2 returned"),
        ([answer(sub_tag=1, strand_id="a"), answer(sub_tag=2, strand_id="b")], "2 split off are not the 2 returned"),
        ([answer(sub_tag=0, strand_id="a"), answer(sub_tag=1, strand_id="a")], "same id"),
        ([answer(read_id="another")], "the answer is to read another"),
        ([answer(split_point=5000)], "split at sample 5000 of a read of 5000"),
        ([answer(datasets={"qstring": "55"})], "6 bases with 2 qualities"),
    ],
)
def test_contradictions(answers: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        outcome(*answers)


def test_empty() -> None:
    short = outcome_of(read(99), [{"datasets": {"sequence": "", "qstring": ""}}], **PLAIN)
    assert short == Outcome.skipped("too_short")
    assert outcome(answer("")) == Outcome.skipped("no_bases")


def test_moves() -> None:
    moves = np.array([1, 0, 1, 1], np.uint8)
    (call,) = outcome(answer(datasets={"movement": moves}), moves=True).calls
    assert call.moves is not None
    assert call.moves.tolist() == [1, 0, 1, 1]
    assert outcome(answer(datasets={"movement": moves})).calls[0].moves is None
    with pytest.raises(ValueError, match="no move table"):
        outcome(answer(), moves=True)


#: ACGTCC with C at 1, 4, 5; columns A C m h G T.
TABLE = np.array(
    [
        [255, 0, 0, 0, 0, 0],
        [0, 50, 200, 5, 0, 0],
        [0, 0, 0, 0, 255, 0],
        [0, 0, 0, 0, 0, 255],
        [0, 255, 0, 0, 0, 0],
        [0, 1, 4, 250, 0, 0],
    ],
    np.uint8,
)


def test_modified_bases_from_the_table() -> None:
    for given in (TABLE, TABLE.reshape(-1)):
        made = outcome(
            answer(
                datasets={"base_mod_probs": given},
                base_mod_alphabet="ACmhGT",
                base_mod_long_names="5mC 5hmC",
                base_mod_context="",
            ),
            mods=True,
        )
        modified = made.calls[0].modified
        assert modified is not None
        assert modified.positions == "C+m.,0,1;C+h.,0,1;"
        assert modified.probabilities.tolist() == [200, 4, 5, 250]


def test_modified_bases_by_number_and_by_long_name() -> None:
    numbered = modified_bases(TABLE, ["A", "C", "21839", "h", "G", "T"], b"ACGTCC", names=[], in_context=True)
    assert numbered is not None
    assert numbered.positions == "C+21839?,0,1;C+h?,0,1;"
    named = modified_bases(TABLE, ["A", "C", "Y", "h", "G", "T"], b"ACGTCC", names=["5mC", "5hmC"], in_context=False)
    assert named is not None
    assert named.positions.startswith("C+m.")
    with pytest.raises(ValueError, match="nobody knows symbol 'Y'"):
        modified_bases(TABLE, ["A", "C", "Y", "h", "G", "T"], b"ACGTCC", names=[], in_context=False)


def test_a_table_that_does_not_fit_its_alphabet() -> None:
    with pytest.raises(ValueError, match="36 probabilities for 6 bases"):
        outcome(answer(datasets={"base_mod_probs": TABLE}, base_mod_alphabet="ACmGT"), mods=True)


RECORD = "r\t16\tchr1\t11\t60\t6M\t*\t0\t0\tGGACGT\t555555"


def test_alignments_and_their_modified_bases() -> None:
    record = f"{RECORD}\tMM:Z:C+m?,1;\tML:B:C,77"
    secondary = RECORD.replace("\t16\t", "\t272\t")
    (call,) = outcome(answer(alignment_sam_record=f"{secondary}\n{record}\n"), mods=True).calls
    assert call.alignments == (record, secondary)
    assert call.modified is not None
    assert (call.modified.positions, call.modified.probabilities.tolist()) == ("C+m?,1;", [77])


def test_barcodes_and_tails() -> None:
    told = {
        "barcode_arrangement": "barcode07",
        "barcode_kit": "K",
        "barcode_score": 88.5,
        "barcode_front_begin_index": 3,
    }
    (call,) = outcome(answer(**told, poly_tail_length=31, poly_tail_anchor=12), barcodes=True, poly_a=True).calls
    assert call.barcode is not None
    assert (call.barcode.arrangement, call.barcode.kit, call.barcode.score) == ("barcode07", "K", 88.5)
    assert (call.barcode.front_begin_index, call.barcode.rear_end_index) == (3, -1)
    assert call.poly_tail is not None
    assert (call.poly_tail.length, call.poly_tail.anchor, call.poly_tail.end_2) == (31, 12, -1)
    (call,) = outcome(answer(), barcodes=True, poly_a=True).calls
    assert call.barcode is not None
    assert call.barcode.arrangement == "unclassified"
    assert call.poly_tail is not None
    assert call.poly_tail.length == -1


def test_duplex() -> None:
    (call,) = outcome(answer(duplex_strand_1="a", duplex_strand_2="b", strand_id="a;b")).calls
    assert (call.duplex, call.duplex_parents, call.read_id) == (1, ("a", "b"), "a;b")
    (call,) = outcome(answer(is_duplex_parent=1)).calls
    assert call.duplex == -1
