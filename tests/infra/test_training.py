"""What of training needs no torch: the loss, aligning reads with their calls, and drawing chunks of them."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from infra.training import squiggles
from infra.training.levels import FIRST, LAST, MOVES, Levels, in_other_state, other_state, surroundings
from infra.training.native import library, pointer
from infra.training.prepared import Prepared
from infra.training.reads import KMER, NEWEST, CalledRead, SegmentedRead, kmers_of, segmented
from infra.training.squiggles import (
    AWAY,
    SAMPLES,
    STRIDE,
    Chunks,
    Simulator,
    form_of,
    made_up_genome,
    manners_of,
    new_sequences,
    plain_dwells,
    random_sequence,
    residuals,
)
from tests.data import program

TABLE = np.random.default_rng(9).standard_normal(4**KMER).astype(np.float32)
LOUD = np.random.default_rng(8).random(4**KMER).astype(np.float32)
RANKS = LOUD.argsort().argsort() / len(LOUD)
LEVELS = Levels(np.stack([TABLE, TABLE]), LOUD, [])


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    program("cc")


def ctc(p: np.ndarray, label: list[int]) -> tuple[float, np.ndarray]:
    labels, lengths = np.array(label, np.int32), np.array([len(label)], np.int32)
    gradient, loss = np.zeros_like(p), np.zeros(1)
    library().ctc(pointer(p), 1, len(p), pointer(labels), pointer(lengths), pointer(gradient), pointer(loss))
    return float(loss[0]), gradient


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits)
    return (p / p.sum(axis=1, keepdims=True)).astype(np.float32)


def spelt(path: tuple[int, ...]) -> list[int]:
    kept = [symbol for i, symbol in enumerate(path) if i == 0 or symbol != path[i - 1]]
    return [symbol for symbol in kept if symbol]


@pytest.mark.parametrize("label", [[1], [2, 2], [1, 3, 4], [4, 4, 4]])
def test_the_loss_is_that_of_all_paths_which_spell_the_label(label: list[int]) -> None:
    logits = np.random.default_rng(len(label)).standard_normal((6, 5))
    p = softmax(logits)
    total = sum(float(np.prod(p[np.arange(6), path])) for path in product(range(5), repeat=6) if spelt(path) == label)
    loss, gradient = ctc(p, label)
    assert loss == pytest.approx(-np.log(total), rel=1e-5)
    for t, symbol in ((0, 0), (3, label[0]), (5, 2)):
        shifted = logits.copy()
        shifted[t, symbol] += 1e-2
        assert gradient[t, symbol] == pytest.approx((ctc(softmax(shifted), label)[0] - loss) / 1e-2, abs=5e-3)


def test_a_label_that_is_too_long_has_no_loss() -> None:
    loss, gradient = ctc(softmax(np.zeros((2, 5))), [1, 1])
    assert loss == 0
    assert not gradient.any()


def called_read(bases: int = 1200, *, noise: float = 0.0) -> tuple[CalledRead, np.ndarray]:
    """Make a read of known borders, and moves that lag behind and are rounded, as real ones are."""
    rng = np.random.default_rng(3)
    sequence = rng.integers(0, 4, bases).astype(np.int8)
    level = TABLE[kmers_of(sequence)]
    dwells = rng.integers(3, 20, len(level))
    lead, tail = 50, 300
    borders = lead + np.concatenate(([0], np.cumsum(dwells)))
    signal = 0.75 * np.repeat(level, dwells) - 0.1
    signal = np.concatenate((np.zeros(lead), signal, np.zeros(tail))) + noise * rng.standard_normal(borders[-1] + tail)
    arrivals = np.full(bases, borders[-1] + 4)
    arrivals[NEWEST : NEWEST + len(borders)] = borders // 6 * 6 + 4
    arrivals[:NEWEST] = 0
    return CalledRead("read", signal.astype(np.float32), sequence, arrivals), borders


def test_borders_are_found_to_the_sample() -> None:
    read, borders = called_read(noise=0.02)
    found = segmented(read, TABLE[kmers_of(read.bases)])
    assert found.gain == pytest.approx(0.75, abs=0.01)
    assert found.offset == pytest.approx(-0.1, abs=0.01)
    off = found.starts + int(read.arrivals[NEWEST]) - borders
    assert np.mean(np.abs(off[1:-1]) <= 1) > 0.97
    assert np.median(np.abs(found.residuals)) < 0.02


def test_a_call_that_is_not_the_signals_is_named() -> None:
    read, _ = called_read()
    short = CalledRead("r1", read.signal[:2000], read.bases, np.linspace(0, 1999, len(read.bases)).astype(np.int64))
    with pytest.raises(ValueError, match="read r1"):
        segmented(short, TABLE[kmers_of(short.bases)])


def simulator(kept: float) -> tuple[SegmentedRead, Simulator]:
    called = called_read(noise=0.02)[0]
    read = segmented(called, TABLE[kmers_of(called.bases)])
    sequences = new_sequences([read.bases], LEVELS, np.random.default_rng(1), pieces=5)
    return read, Simulator([read], [np.zeros(len(read.level), bool)], sequences, LEVELS, kept=kept)


def test_easy_chunks_are_levels_of_one_length() -> None:
    read, drawing = simulator(kept=0.0)
    chunks = drawing.draw(3, (0.0, 0.0), np.random.default_rng(1))
    assert chunks.signal.shape == (3, SAMPLES)
    for signal, label, length, context in zip(
        chunks.signal, chunks.labels, chunks.lengths, chunks.context, strict=True
    ):
        assert length == pytest.approx(SAMPLES / 10, abs=2)
        # The newest base at the last frame is the last of the label, unless that came after the middle of the frame.
        assert context[-1, NEWEST - 2] + 1 in label[length - 2 : length]
        flat = np.abs(np.diff(signal)) < 1e-6  # but for borders, which take up to three samples
        assert flat.mean() > 0.55
        levels = (signal[:-1][flat] - read.offset) / read.gain
        assert np.abs(TABLE[:, None] - levels[::100]).min(axis=0) == pytest.approx(0, abs=1e-4)


def test_what_is_drawn_from_a_read_is_what_was_put_in() -> None:
    called = called_read(4000, noise=0.05)[0]
    read = segmented(called, TABLE[kmers_of(called.bases)])
    dwells = plain_dwells(read)
    assert dwells.mean() == pytest.approx(1, abs=0.05)
    assert np.quantile(dwells, [0, 1]) == pytest.approx([3 / 11, 19 / 11], abs=0.2)
    (manner,) = manners_of(read, np.zeros(len(read.level), bool), RANKS)
    assert manner.speeds == pytest.approx(11, abs=1)
    assert np.nanstd(manner.off) == pytest.approx(0.05 / np.sqrt(11), abs=0.01)


def test_events_give_their_residuals_to_events_of_other_dwells() -> None:
    called = called_read(noise=0.05)[0]
    read = segmented(called, TABLE[kmers_of(called.bases)])
    events = np.array([40, 7, 300])
    ranges = [range(*read.starts[event : event + 2]) for event in events]
    same = residuals(read, events, read.dwells[events])
    assert np.array_equal(same, np.concatenate([read.residuals[list(one)] for one in ranges]))
    for dwells in (read.dwells[events] + 4, np.maximum(read.dwells[events] - 2, 2)):
        found = residuals(read, events, dwells)
        ends = np.cumsum(dwells)
        assert found[ends - dwells] == pytest.approx([read.residuals[one[0]] for one in ranges])
        assert found[ends - 1] == pytest.approx([read.residuals[one[-1]] for one in ranges])
    off = np.array([0.3, np.nan, -0.1])
    means = np.add.reduceat(residuals(read, events, read.dwells[events], off), [0, *read.dwells[events].cumsum()[:2]])
    assert means / read.dwells[events] == pytest.approx([0.3, read.offsets[7], -0.1])


def test_a_short_stay_in_the_other_state_is_no_manner_of_its_own() -> None:
    called = called_read(1200, noise=0.05)[0]
    read = segmented(called, TABLE[kmers_of(called.bases)])
    other = np.arange(len(read.level)) < 500
    assert [manner.state for manner in manners_of(read, other, RANKS)] == [0, 1]
    other = np.arange(len(read.level)) < 100
    assert [manner.state for manner in manners_of(read, other, RANKS)] == [0]


def test_noise_comes_from_events_that_are_alike() -> None:
    rng = np.random.default_rng(6)
    bases = rng.integers(0, 4, 6008).astype(np.int8)
    level = TABLE[kmers_of(bases)]
    starts = np.insert(np.cumsum(rng.integers(3, 20, 6000)), 0, 0)
    noise = 0.1 * rng.standard_normal(starts[-1], np.float32)
    read = SegmentedRead(bases, level, starts, noise, 0.0, 0.75)
    (manner,) = manners_of(read, np.zeros(6000, bool), RANKS)
    new = rng.integers(0, 4, 308).astype(np.int8)
    dwells, unknown = rng.integers(3, 20, 300), np.full(300, np.nan)
    form = form_of(RANKS[kmers_of(new)], TABLE[kmers_of(new)], dwells, unknown)
    found = manner.alike(form, slice(1000, 2000), rng)
    assert not ((found >= 1000) & (found < 2000)).any()
    theirs = form_of(RANKS[kmers_of(bases)], level, read.dwells, read.offsets)
    apart = np.sqrt(((theirs[:4, found] - form[:4]) ** 2).sum(axis=0))
    others = np.sqrt(((theirs[:4, rng.integers(1, 5999, 300)] - form[:4]) ** 2).sum(axis=0))
    assert np.median(apart) < 0.3 * np.median(others)
    form[4] = 0.1 / AWAY
    assert np.mean(read.offsets[manner.alike(form, slice(0, 0), rng)]) > 0.03 > abs(np.mean(read.offsets[found]))


def test_loud_nine_mers_are_loud_in_what_is_made() -> None:
    rng = np.random.default_rng(6)
    bases = rng.integers(0, 4, 6008).astype(np.int8)
    loud = LOUD[kmers_of(bases)]
    noise = np.repeat(np.where(loud > 0.5, 0.1, 0.01), 10) * rng.standard_normal(60_000)
    level, dwells = TABLE[kmers_of(bases)], np.full(6000, 10)
    read = SegmentedRead(bases, level, np.arange(0, 60_001, 10), noise.astype(np.float32), 0.0, 0.75)
    (manner,) = manners_of(read, np.zeros(6000, bool), RANKS)
    form = form_of(RANKS[kmers_of(bases)], level, dwells, np.full(6000, np.nan))
    found = [
        manner.alike(form[:, some], slice(some[0], some[-1] + 1), rng) for some in np.arange(6000).reshape(20, 300)
    ]
    heard = residuals(read, np.concatenate(found), dwells).reshape(6000, 10).std(axis=1)
    far = np.abs(loud - 0.5) > squiggles.RANK  # those nearer may sound like either kind
    assert heard[far & (loud < 0.5)].mean() == pytest.approx(0.01, rel=0.2)
    assert heard[far & (loud > 0.5)].mean() == pytest.approx(0.1, rel=0.2)


def test_kept_chunks_have_the_reads_own_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squiggles, "MUTATIONS", 0.0)
    read, drawing = simulator(kept=1.0)
    chunks = drawing.draw(4, (1.0, 1.0), np.random.default_rng(2))
    own = "".join(map(str, read.bases + 1))
    labels = [label[:length] for label, length in zip(chunks.labels, chunks.lengths, strict=True)]
    assert all("".join(map(str, label)) in own for label in labels)
    assert all(len(label) <= SAMPLES // STRIDE for label in labels)


def test_kept_chunks_have_the_offsets_of_their_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a read's events are off by is all that differs between two draws, and comes in the order of the events."""
    monkeypatch.setattr(squiggles, "MUTATIONS", 0.0)
    rng = np.random.default_rng(7)
    bases = rng.integers(0, 4, 6008).astype(np.int8)
    level, starts, above = TABLE[kmers_of(bases)], np.arange(0, 60_001, 10), rng.random(6000) < 0.5
    sequences = new_sequences([bases], LEVELS, rng, pieces=5)

    def drawn(off: np.ndarray) -> Chunks:
        read = SegmentedRead(bases, level, starts, np.repeat(off, 10).astype(np.float32), 0.0, 0.75)
        drawing = Simulator([read], [np.zeros(6000, bool)], sequences, LEVELS, kept=1.0)
        return drawing.draw(4, (1.0, 1.0), np.random.default_rng(8))

    chunks, without = drawn(np.where(above, 0.2, -0.2)), drawn(np.zeros(6000))
    own = "".join(map(str, bases + 1))
    for label, length, off in zip(chunks.labels, chunks.lengths, chunks.signal - without.signal, strict=True):
        first = own.index("".join(map(str, label[:length]))) - NEWEST - 1
        clear = off[np.abs(off) > 0.08] > 0
        changes = np.diff(above[first : first + length + 1]).sum()  # the first and the last event hardly show
        assert np.diff(clear).sum() == pytest.approx(changes, abs=2)


def test_the_other_state_is_what_some_windows_have_in_common() -> None:
    rng = np.random.default_rng(5)
    bases = rng.integers(0, 4, 9008).astype(np.int8)
    level = TABLE[kmers_of(bases)]
    off = 0.2 * bases[5:-3] - 0.3  # of event i, by base 5 of its 9-mer
    off[:4500] = 0
    residuals = np.repeat(0.75 * off, 10) + rng.normal(0, 0.02, 90_000)
    read = SegmentedRead(bases, level, np.arange(0, 90_001, 10), residuals.astype(np.float32), 0.0, 0.75)
    other = in_other_state(read)
    assert np.array_equal(other, np.arange(9000) >= 4500)
    expected = 0.2 * (np.arange(4**KMER) // 4**3 % 4) - 0.3
    for run in (2, 3):
        assert np.abs(other_state([read], [other], TABLE, run) - expected).max() < 0.03
    assert not other_state([read], [np.zeros(9000, bool)], TABLE, 2).any()


def test_what_lies_about_a_nine_mer_moves_its_level() -> None:
    """A layer that moves a level a tenth of the way to the one before it when an A lies two bases before the 9-mer."""
    weights = np.zeros((4 * (LAST - FIRST), MOVES), np.float32)
    weights[4 * (-2 - FIRST), 1] = 0.1
    levels = Levels(LEVELS.tables, LOUD, [weights, np.zeros(MOVES, np.float32)])
    bases = np.random.default_rng(2).integers(0, 4, 400).astype(np.int8)
    level = TABLE[kmers_of(bases)]
    moved = levels.of(bases, np.bool_(False)) - level
    after = np.insert(level[:-1] - level[1:], 0, 0.0)
    a_before = np.concatenate(([False, False], bases[: len(level) - 2] == 0))
    assert moved == pytest.approx(np.where(a_before, 0.1 * after, 0), abs=1e-5)


def test_surroundings_end_where_the_sequence_does() -> None:
    bases = np.array([2, 0, 3, 1] * 5, np.int8)
    seen = surroundings(bases, slice(0, 12)).reshape(12, LAST - FIRST, 4)
    assert seen[0, -FIRST].tolist() == [0, 0, 1, 0]
    assert not seen[0, :-FIRST].any()
    assert seen[11].sum() == len(bases) - 11 - FIRST
    assert np.array_equal(surroundings(bases, slice(5, 9)).reshape(4, LAST - FIRST, 4), seen[5:9])


def test_random_sequences_have_all_bases_and_repeats() -> None:
    made = random_sequence(np.random.default_rng(1))
    assert np.bincount(made).tolist() == pytest.approx([1000] * 4, rel=0.5)
    runs = np.diff(np.flatnonzero(np.insert(np.diff(made) != 0, 0, True)))
    assert runs.max() >= 8


def test_the_same_seed_draws_the_same() -> None:
    drawing = simulator(kept=0.3)[1]
    one, other = (drawing.draw(5, (0.2, 0.8), np.random.default_rng((7, 12))) for _ in range(2))
    assert np.array_equal(one.signal, other.signal)
    assert np.array_equal(one.labels, other.labels)


def test_what_is_prepared_is_read_as_it_was_written(tmp_path: Path) -> None:
    called = called_read()[0]
    read = segmented(called, TABLE[kmers_of(called.bases)])
    weights = np.random.default_rng(3).standard_normal((4 * (LAST - FIRST), MOVES)).astype(np.float32)
    levels = Levels(LEVELS.tables, LOUD, [weights, np.zeros(MOVES, np.float32)])
    sequences = new_sequences([read.bases], levels, np.random.default_rng(1), pieces=2)
    written = Prepared([read, read], [np.ones(len(read.level), bool)] * 2, levels, sequences, [called])
    written.save(tmp_path / "prepared.npz")
    found = Prepared.load(tmp_path / "prepared.npz")
    assert (found.reads[1].gain, found.validation[0].read_id) == (read.gain, "read")
    assert np.array_equal(found.reads[1].residuals, read.residuals)
    assert np.array_equal(found.states[1], written.states[1])
    assert np.array_equal(found.levels.layers[0], weights)
    assert found.sequences.levels == pytest.approx(sequences.levels, rel=1e-3, abs=1e-4)


def test_a_made_up_genome_is_like_its_model() -> None:
    rng = np.random.default_rng(4)
    poly = np.repeat(rng.integers(0, 4, 3000), 8).astype(np.int8)  # every base eight times
    made = made_up_genome([poly], rng, chains=10, length=6000)
    same = np.mean(made[1:] == made[:-1])
    assert same == pytest.approx(np.mean(poly[1:] == poly[:-1]), abs=0.08)  # a random base would be 0.25
