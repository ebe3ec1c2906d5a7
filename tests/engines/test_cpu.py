from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pod5
import pytest

from infra.training.reads import HELD_OUT
from tasks.core.calls import Fate, Outcome
from tasks.core.errors import EngineError, SettingsError
from tasks.core.reads import Read
from tasks.engines import cpu
from tasks.engines.catalogue import find_model
from tasks.engines.cpu import WAITING_READS, CpuEngine, _Calling, middle_and_spread, padded
from tasks.engines.networks import open_network
from tasks.engines.registry import identify, open_engine
from tasks.formats.pod5 import Unreadable, read_rows
from tasks.settings import EngineSettings
from tests.data import library, shared
from tests.engines.squiggles import squiggle
from tests.engines.test_bonito import edits
from tests.making import run_info

#: Samples per chunk and of overlap of the bundled model.
CHUNK, OVERLAP = 6000, 300


@pytest.fixture(scope="module")
def engine() -> CpuEngine:
    return CpuEngine(find_model(None), moves=True)


def call(engine: CpuEngine, given: Read) -> Outcome:
    ((answered, outcome),) = engine.basecall([given])
    assert answered is given
    return outcome


def signal(values: float | np.ndarray, samples: int = 20_000) -> np.ndarray:
    return np.broadcast_to(values, samples).astype(np.int16)


@pytest.mark.parametrize(
    ("adc", "reason"),
    [
        pytest.param(signal(600, 10), "too_short", id="10 samples"),
        pytest.param(signal(600, 99), "too_short", id="99 samples"),
        pytest.param(signal(0, 0), "too_short", id="empty"),
        pytest.param(signal(0), "dead_signal", id="dead channel"),
        pytest.param(signal(32767), "dead_signal", id="saturated"),
        pytest.param(signal(600), "dead_signal", id="constant"),
    ],
)
def test_nothing_to_call(engine: CpuEngine, adc: np.ndarray, reason: str) -> None:
    outcome = call(engine, replace(squiggle(1), signal=adc))
    assert (outcome.fate, outcome.reason) == (Fate.SKIPPED, reason)


@pytest.mark.parametrize("samples", [100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - OVERLAP, 2 * CHUNK - OVERLAP + 6])
@pytest.mark.parametrize("rate", [4000, 5000])
def test_lengths_around_chunk_edges(engine: CpuEngine, samples: int, rate: int) -> None:
    outcome = call(engine, squiggle(samples * rate // 4000, run=run_info(sample_rate=rate)))
    assert outcome.fate is Fate.CALLED or outcome.reason == "no_bases"
    for made in outcome.calls:
        assert made.moves is not None
        assert made.moves.sum() == len(made.sequence)
        assert np.isfinite(made.mean_qscore)


@pytest.mark.parametrize("frames_apart", [-1, 0, 1])
@pytest.mark.parametrize("order", [[(0, 0), (1, CHUNK - OVERLAP)], [(1, CHUNK - OVERLAP), (0, 0)]])
def test_a_base_across_a_seam_is_one_base(frames_apart: int, order: list[tuple[int, int]]) -> None:
    """Whichever chunk comes back first."""
    read, model = squiggle(2 * CHUNK - OVERLAP, run=run_info(sample_rate=4000)), find_model(None)
    calling = _Calling(read, model, open_network(model, threads=1, int8=False), moves=True, trim=False)
    chunks = list(calling.chunks())
    assert [len(chunk) for chunk in chunks] == [CHUNK, CHUNK]
    middle = (CHUNK - OVERLAP // 2) // 3
    for number, start in order:  # both chunks see both bases, the second one not alike
        frames = np.zeros(CHUNK // 3, np.uint8)
        frames[middle - 5 - start // 3] = 2
        frames[middle - start // 3 - number * frames_apart] = 1
        calling.take(number, (frames, np.full(CHUNK // 3, 0.9, np.float32)))
    made = calling.outcome().calls[0]
    assert made.sequence == b"CA"
    assert made.moves is not None
    assert np.flatnonzero(made.moves).tolist() == [middle - 5, middle - frames_apart]


@pytest.mark.parametrize(
    ("length", "size"), [(6, 750), (648, 750), (654, 1500), (5400, 6000), (5898, 6000), (5904, 6750), (6000, 6000)]
)
def test_short_reads_cost_as_much_as_they_are_long(length: int, size: int) -> None:
    assert padded(length, CHUNK) == size


@pytest.mark.parametrize("adc", [pytest.param(0, id="dead"), pytest.param(1500, id="open pore")])
def test_stretches_without_a_strand_change_no_scaling_and_have_no_bases(engine: CpuEngine, adc: int) -> None:
    run = run_info(sample_rate=4000)
    alive = squiggle(20_000, run=run)
    empty = replace(alive, signal=np.concatenate((alive.signal, signal(adc), alive.signal[:5000], signal(adc, 3050))))
    ours, theirs = call(engine, alive).calls[0], call(engine, empty).calls[0]
    assert theirs.scaling_midpoint == pytest.approx(ours.scaling_midpoint, rel=0.01)
    assert theirs.scaling_dispersion == pytest.approx(ours.scaling_dispersion, rel=0.01)
    assert theirs.moves is not None
    per_block = theirs.moves[: 48_000 // 3].reshape(-1, 1000).sum(axis=1)  # 3000 samples each
    assert all(per_block[[0, 1, 2, 3, 4, 5, 14]] > 20)
    assert not per_block[[7, 8, 9, 10, 11, 12, 15]].any()


def test_a_strand_that_is_out_of_range_for_a_moment_is_called(engine: CpuEngine) -> None:
    alive = squiggle(20_000, run=run_info(sample_rate=4000))
    spiked = alive.signal.copy()
    spiked[4000::500] = 0
    moves = call(engine, replace(alive, signal=spiked)).calls[0].moves
    assert moves is not None
    assert all(moves[:6600].reshape(-1, 100).sum(axis=1) > 0)


def test_a_long_read(engine: CpuEngine) -> None:
    long = squiggle(2_000_000, run=run_info(sample_rate=4000))
    outcome = call(engine, long)
    assert outcome.fate is Fate.CALLED
    assert len(outcome.calls[0].sequence) > 1000


def test_skipped_reads_do_not_pile_up_behind_a_waiting_one(engine: CpuEngine) -> None:
    pulled = 0

    def source() -> Iterator[Read]:
        nonlocal pulled
        yield squiggle(5000)
        dead = signal(0, 10)
        for number in range(2, 3000):
            pulled += 1
            yield replace(squiggle(1, number=number), signal=dead)

    next(iter(engine.basecall(source())))
    assert pulled <= WAITING_READS + 1


def test_long_reads_do_not_pile_up_behind_a_waiting_one(engine: CpuEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one's end waits in a size that no other read has."""
    monkeypatch.setattr(cpu, "WAITING_SAMPLES", 50_000)
    pulled = 0

    def source() -> Iterator[Read]:
        nonlocal pulled
        run = run_info(sample_rate=4000)
        yield squiggle(CHUNK + 1000, run=run)
        for number in range(2, 100):
            pulled += 1
            yield squiggle(CHUNK, number=number, run=run)

    next(iter(engine.basecall(source())))
    assert pulled <= 9


@pytest.mark.parametrize(
    ("strategy", "figures", "middle", "spread"),
    [
        ("pa", (90.0, 20.0), 90.0, 20.0),
        ("quantile", (0.2, 0.8, 0.5, 0.5), 80.0, 24.0),
        ("med_mad", (), 80.0, 1.4826 * 20),
    ],
)
def test_scaling(strategy: str, figures: tuple[float, ...], middle: float, spread: float) -> None:
    current = np.linspace(40, 120, 81, dtype=np.float32)
    assert middle_and_spread(current, strategy, figures) == pytest.approx((middle, spread))


def test_where_chunks_fall_changes_few_bases_and_no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a few: 8 to 11 per seam of either were measured (infra/training/README.md tells why)."""
    truths = _truths()
    reads = _real_reads(shared("data", "r10_4khz", "sq_f5c_reads.pod5"))
    real = next(r for r in reads if r.read_id[:8] in HELD_OUT and 50_000 < r.num_samples < 150_000)
    calls, identities = [], []
    for size in (CHUNK, 5250, 4500):
        other = CpuEngine(find_model(None))
        monkeypatch.setattr(other._network, "chunk", size)
        calls.append(call(other, real).calls[0].sequence)
        identities.append(_identity(calls[-1], truths[real.read_id]))
    seams = [real.num_samples // (size - OVERLAP) for size in (CHUNK, 5250, 4500)]
    for sequence, count in zip(calls[1:], seams[1:], strict=True):
        assert edits(calls[0], sequence) <= 14 * (seams[0] + count)
    assert np.ptp(identities) < 0.01


def test_an_exception_inside_a_read_is_its_answer(engine: CpuEngine, caplog: pytest.LogCaptureFixture) -> None:
    bad = replace(squiggle(20_000), run=run_info(sample_rate=0))
    with caplog.at_level(logging.CRITICAL + 1, logger="tasks.engines.cpu"):
        outcome = call(engine, bad)
    assert outcome.fate is Fate.QUARANTINED
    assert outcome.reason.startswith("exception: ZeroDivisionError: ")


class _Torn(np.ndarray):
    """A signal that can't be read any more after its first chunk."""

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        if isinstance(key, slice) and (key.start or 0) > 0:
            raise OSError("page gone")
        return np.asarray(self)[key]


def test_an_exception_amid_a_read_leaves_its_neighbours_whole(engine: CpuEngine) -> None:
    good = [squiggle(20_000, number=n, run=run_info(sample_rate=4000)) for n in (1, 3)]
    bad = replace(good[0], read_id="bad", signal=good[0].signal.view(_Torn))
    expected = [call(engine, r).calls[0].sequence for r in good]
    answers = list(engine.basecall([good[0], bad, good[1]]))
    assert [o.fate for _, o in answers] == [Fate.CALLED, Fate.QUARANTINED, Fate.CALLED]
    assert answers[1][1].reason == "exception: OSError: page gone"
    assert [o.calls[0].sequence for _, o in answers if o.calls] == expected


def _real_reads(path: Path) -> list[Read]:
    with pod5.Reader(path) as reader:
        rows = reader.num_reads
    reads = list(read_rows(str(path), 0, rows))
    assert not any(isinstance(r, Unreadable) for r in reads)
    return [r for r in reads if isinstance(r, Read)]


def _truths() -> dict[str, str]:
    """Read the published calls of sq_f5c, by read id."""
    lines = shared("data", "r10_4khz", "sq_f5c_reads.truth.fastq").read_text().splitlines()
    return {name[1:].split()[0]: truth for name, truth in zip(lines[::4], lines[1::4], strict=True)}


def _identity(sequence: bytes, truth: str) -> float:
    """Return matches per alignment column of the longest hit against the truth; 0 when there is none."""
    aligner = library("mappy").Aligner(seq=truth, preset="map-ont", k=11, w=5, min_chain_score=20, min_dp_score=20)
    hits = [hit for hit in aligner.map(sequence.decode()) if hit.strand == 1]
    best = max(hits, key=lambda hit: int(hit.blen), default=None)
    return best.mlen / best.blen if best else 0.0


def test_identity_on_held_out_reads(engine: CpuEngine) -> None:
    truths = _truths()
    reads = [r for r in _real_reads(shared("data", "r10_4khz", "sq_f5c_reads.pod5")) if r.read_id[:8] in HELD_OUT]
    assert len(reads) == len(HELD_OUT)
    identities, scores = [], []
    for given, outcome in engine.basecall(reads):
        identities.append(_identity(outcome.calls[0].sequence, truths[given.read_id]))
        scores.append(outcome.calls[0].mean_qscore)
        assert len(outcome.calls[0].sequence) == pytest.approx(len(truths[given.read_id]), rel=0.15)
    assert min(identities) > 0.81, identities
    assert scores == pytest.approx(-10 * np.log10(1 - np.array(identities)), abs=1)


def test_identity_at_5_khz(engine: CpuEngine) -> None:
    truth = shared("data", "r10_5khz", "slorado_one_5khz.truth.fastq").read_text().splitlines()[1]
    (given,) = _real_reads(shared("data", "r10_5khz", "slorado_one_5khz.pod5"))
    assert given.run.sample_rate == 5000
    assert _identity(call(engine, given).calls[0].sequence, truth) > 0.85


def test_adapters_of_real_reads_are_cut_off_on_request(engine: CpuEngine) -> None:
    """Only from the front: in these reads' published calls, too, the pore had let go before the other one."""
    cutting, found = open_engine(EngineSettings(moves=True)), []
    reads = _real_reads(shared("data", "r10_4khz", "sq_f5c_reads.pod5"))
    reads = [r for r in reads if r.num_samples < 40_000 and r.read_id[:8] not in HELD_OUT]
    for (_, outcome), (_, as_called) in zip(cutting.basecall(reads), engine.basecall(reads), strict=True):
        (cut,), (whole,) = outcome.calls, as_called.calls
        gone = len(whole.sequence) - len(cut.sequence)
        assert (cut.sequence, cut.qstring) == (whole.sequence[gone:], whole.qstring[gone:])
        assert cut.moves is not None
        assert whole.moves is not None
        assert cut.trimmed_samples == cut.stride * (np.flatnonzero(whole.moves)[gone] if gone else 0)
        assert np.array_equal(cut.moves, whole.moves[cut.trimmed_samples // cut.stride :])
        found += [gone] if gone else []
    assert len(reads) == 10
    assert len(found) >= 5
    assert all(20 < gone < 45 for gone in found)


def test_unknown_model_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="minnow-v6"):
        find_model("halibut")
    with pytest.raises(SettingsError, match=r"no folder with one \*\.toml"):
        find_model(str(tmp_path))


def test_int8_is_not_for_the_bundled_model() -> None:
    with pytest.raises(SettingsError, match=r"engine\.int8 .* minnow-v6 is as it is"):
        identify(EngineSettings(int8=True))


def test_model_by_folder_and_by_file(tmp_path: Path) -> None:
    bundled = find_model(None)
    for name in ("minnow-v6.toml", "minnow-v6.onnx"):
        (tmp_path / name).write_bytes((bundled.weights.parent / name).read_bytes())
    assert find_model(str(tmp_path)).digest == bundled.digest
    assert find_model(str(tmp_path / "minnow-v6.toml")).weights == tmp_path / "minnow-v6.onnx"


def test_broken_weights(tmp_path: Path) -> None:
    weights = tmp_path / "broken.onnx"
    weights.write_bytes(b"not a network")
    with pytest.raises(EngineError, match=r"broken\.onnx"):
        CpuEngine(replace(find_model(None), weights=weights))
