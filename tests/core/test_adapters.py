"""Adapters: found where they are, however badly called, and nowhere else; what is cut keeps its figures straight."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.adapters import ADAPTER, WINDOW, insert_of, without_adapters
from tasks.core.alignment import reverse_complement
from tasks.core.calls import BasecalledRead, mean_qscore

COMPLEMENT = bytes.maketrans(b"ACGT", b"TGCA")
OTHER_STRAND = reverse_complement(ADAPTER)
bases = st.text("ACGT", max_size=300).map(str.encode)


def made_up(length: int, seed: int) -> bytes:
    return bytes(random.Random(seed).choices(b"ACGT", k=length))


def called_badly(sequence: bytes, errors: int, seed: int) -> bytes:
    """Put errors of all three kinds in, each in a place of its own."""
    dice = random.Random(seed)
    called = [bytes([base]) for base in sequence]
    for place in dice.sample(range(len(sequence)), errors):
        called[place] = dice.choice((b"", called[place] * 2, called[place].translate(COMPLEMENT)))
    return b"".join(called)


def call(sequence: bytes, *, strides: int = 2000, trimmed: int = 0) -> tuple[BasecalledRead, np.ndarray]:
    dice = np.random.default_rng(len(sequence))
    starts = np.sort(dice.choice(strides, len(sequence), replace=False))
    moves = np.zeros(strides, np.uint8)
    moves[starts] = 1
    qstring = (dice.integers(1, 50, len(sequence)) + 33).astype(np.uint8).tobytes()
    made = BasecalledRead(
        read_id="a",
        parent_read_id="a",
        sequence=sequence,
        qstring=qstring,
        mean_qscore=mean_qscore(qstring),
        stride=5,
        num_samples=strides * 5 + 3,
        trimmed_samples=trimmed,
        moves=moves,
    )
    return made, starts


@pytest.mark.parametrize("leader", [b"", b"TATGTTAAC", b"TTTTTTTTGTGTTATGTTATG"])
@pytest.mark.parametrize("rear", [0, 10, 28])
def test_cut_at_both_ends(leader: bytes, rear: int) -> None:
    insert = b"GG" + made_up(500, 1) + b"GG"
    sequence = leader + ADAPTER + insert + OTHER_STRAND[:rear]
    assert sequence[insert_of(sequence)] == insert


def test_found_when_called_badly() -> None:
    """Each has three errors, of which one may be in its end."""
    ends = []
    for seed in range(200):
        adapter = called_badly(ADAPTER, 3, seed)
        found = insert_of(b"TATGTTA" + adapter + made_up(400, seed)).start
        if found:
            ends.append(abs(found - 7 - len(adapter)))
    assert len(ends) >= 190
    assert np.mean(np.array(ends) <= 2) > 0.95


def test_its_beginning_may_be_missing() -> None:
    insert = b"GG" + made_up(400, 2)
    assert insert_of(ADAPTER[14:] + insert) == slice(14, 14 + len(insert))


def test_not_found_where_it_is_not() -> None:
    cut = [insert_of(made_up(400, seed)) != slice(0, 400) for seed in range(2000)]
    assert sum(cut) <= 20  # two ends each


def test_not_found_within() -> None:
    sequence = made_up(WINDOW, 3) + ADAPTER + made_up(300, 4)
    assert insert_of(sequence) == slice(0, len(sequence))


@pytest.mark.parametrize("sequence", [b"A", ADAPTER, OTHER_STRAND, ADAPTER + OTHER_STRAND])
def test_a_call_is_never_cut_to_nothing(sequence: bytes) -> None:
    """Adapters that have closed upon themselves stay as they are, as dorado leaves them."""
    assert insert_of(sequence) == slice(0, len(sequence))


@given(bases)
def test_some_of_any_call_is_left(sequence: bytes) -> None:
    insert = insert_of(sequence or b"A")
    assert 0 <= insert.start < insert.stop <= max(len(sequence), 1)


@given(bases, st.integers(0, 28))
def test_a_call_and_its_other_strand_are_cut_alike(middle: bytes, rear: int) -> None:
    sequence = ADAPTER + middle + OTHER_STRAND[:rear]
    there, back = insert_of(sequence), insert_of(reverse_complement(sequence))
    assert (back.start, back.stop) == (len(sequence) - there.stop, len(sequence) - there.start)


def test_figures_follow_the_cut() -> None:
    insert = b"GG" + made_up(400, 5) + b"GG"
    whole, starts = call(b"TTTT" + ADAPTER + insert + OTHER_STRAND[:12], trimmed=200)
    cut = without_adapters(whole, starts)
    assert cut.sequence == insert
    assert cut.qstring == whole.qstring[32:-12]
    assert cut.mean_qscore == pytest.approx(mean_qscore(cut.qstring))
    assert cut.trimmed_samples == 200 + 5 * starts[32]
    assert cut.num_samples == whole.num_samples
    assert cut.moves is not None
    assert np.array_equal(np.flatnonzero(cut.moves), starts[32:-12] - starts[32])
    assert len(cut.moves) == starts[-12] - starts[32]


def test_figures_stay_where_nothing_is_cut() -> None:
    whole, starts = call(made_up(400, 6))
    assert without_adapters(whole, starts) is whole


def test_a_call_without_moves() -> None:
    whole, starts = call(ADAPTER + made_up(300, 7))
    cut = without_adapters(replace(whole, moves=None), starts)
    assert cut.moves is None
    assert cut.trimmed_samples > 0
