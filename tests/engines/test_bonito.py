from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tasks.core.errors import EngineError, SettingsError
from tasks.engines import bonito, crf
from tasks.engines.catalogue import Model, find_model, list_models
from tasks.engines.cpu import CpuEngine
from tasks.engines.torch_weights import read_weights
from tests.engines.bonito_form import (
    CONFIG,
    NAME,
    STAY,
    STRIDE,
    Repeated,
    forward,
    random_weights,
    write_archive,
    write_model,
)
from tests.engines.squiggles import squiggle
from tests.making import run_info

FORMS = ["bonito", "dorado"]
#: Of a linear layer, with how many dimensions each has.
PARTS = (("weight", 2), ("bias", 1))
#: The same network spelt out layer by layer, as newer models have it, with a clamp that changes nothing.
SERIAL = """
[model]
package = "bonito.crf"
[run_info]
sample_rate = 4000
[scaling]
strategy = "pa"
[standardisation]
standardise = 1
mean = 90.0
stdev = 20.0
""" + "".join(
    f"[[encoder.sublayers]]\n{text}\n"
    for text in (
        'type = "convolution"\nsize = 4\nwinlen = 5\nstride = 1\npadding = 2\nactivation = "swish"',
        'type = "convolution"\nsize = 16\nwinlen = 5\nstride = 1\npadding = 2\nactivation = "swish"',
        'type = "convolution"\nsize = 8\nwinlen = 19\nstride = 5\npadding = 9\nactivation = "swish"',
        'type = "permute"\ndims = [2, 0, 1]',
        *(f'type = "lstm"\nsize = 8\nreverse = {1 - i % 2}' for i in range(5)),
        'type = "linearcrfencoder"\nstate_len = 2\nactivation = "tanh"\nscale = 5.0\nblank_score = 2.0',
        'type = "clamp"\nmin = -5.0\nmax = 5.0',
    )
)


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_both_forms(form: str, tmp_path: Path) -> None:
    weights = random_weights()
    read = read_weights(write_model(tmp_path, weights, form=form))
    assert set(read) == set(weights)
    assert all(np.array_equal(read[name], weights[name]) for name in weights)


class _Call:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("run",)


def test_a_pickle_that_names_a_function_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_archive(tmp_path / "weights_1.tar", {"x": _Call()})
    with pytest.raises(SettingsError, match=r"weights_1\.tar: names \w+\.print"):
        read_weights(tmp_path)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"not a zip file"])
def test_damaged_weights_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights_1.tar").write_bytes(content)
    with pytest.raises(SettingsError, match=r"weights_1\.tar"):
        read_weights(tmp_path)


def test_a_tensor_does_not_ask_for_more_than_its_file_holds(tmp_path: Path) -> None:
    """By a step of 0, a few bytes would make any number of numbers."""
    write_archive(tmp_path / "weights_1.tar", {"x": Repeated(np.zeros(1, np.float32), 1 << 40)})
    with pytest.raises(
        SettingsError, match=r"weights_1\.tar: a tensor of shape \(1099511627776,\) does not lie in its 1 numbers"
    ):
        read_weights(tmp_path)


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_pickle_is_an_error_of_ours(seed: int, tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar"
    write_archive(whole, random_weights())
    random = np.random.default_rng(seed)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(tmp_path / "weights_1.tar", "w") as damaged:
        for name in archive.namelist():
            content = bytearray(archive.read(name))
            if name.endswith("data.pkl"):
                for place in random.integers(0, len(content), 5):
                    content[place] = random.integers(0, 256)
            damaged.writestr(name, bytes(content))
    with suppress(SettingsError):  # none where what was hit does not matter
        read_weights(tmp_path)


@pytest.mark.parametrize("config", [CONFIG, SERIAL], ids=["older", "layer by layer"])
def test_the_graph_computes_what_numpy_computes(config: str, tmp_path: Path) -> None:
    weights = random_weights()
    network = bonito.build_network(write_model(tmp_path, weights, form="bonito", config=config))
    x = np.random.default_rng(2).normal(0, 1, (3, 400)).astype(np.float32)
    (y,) = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"]).run(None, {"x": x[:, None]})
    assert y.shape == (400 // STRIDE, 3, 64)
    assert np.abs(y - forward(weights, x)).max() < 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_clamps_between_layers_count_in_the_names_of_bonito_s_weights_alone(form: str, tmp_path: Path) -> None:
    """As models of version 4.2 have them: one behind each convolution."""
    clamp = '[[encoder.sublayers]]\ntype = "clamp"\nmin = -50.0\nmax = 50.0\n'
    layers = SERIAL.split("[[encoder.sublayers]]")
    config = "[[encoder.sublayers]]".join(layers[:2]) + clamp + "[[encoder.sublayers]]".join(["", *layers[2:]])
    weights = random_weights()
    stored = weights
    if form == "bonito":
        stored = {f"{int(n) + (n != '0')}.{rest}": value for (n, _, rest), value in named_parts(weights)}
    network = bonito.build_network(write_model(tmp_path, stored, form=form, config=config))
    x = np.random.default_rng(2).normal(0, 1, (1, 400)).astype(np.float32)
    (y,) = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"]).run(None, {"x": x[:, None]})
    assert np.abs(y - forward(weights, x)).max() < 1e-3


def named_parts(weights: dict[str, np.ndarray]) -> list[tuple[tuple[str, str, str], np.ndarray]]:
    """Split the names of weights at the layer's number."""
    return [(name.partition("."), value) for name, value in weights.items()]


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("0.conv.bias", (1,), r"0\.conv\.bias are of shape \(1,\), where \(4,\)"),
        ("1.conv.weight", (16, 3, 5), r"1\.conv\.weight are of shape \(16, 3, 5\), where \('any', 4, "),
        ("4.rnn.weight_ih_l0", (32, 7), r"4\.rnn\.weight_ih_l0 are of shape"),
        ("4.rnn.weight_hh_l0", (31, 8), r"4\.rnn\.weight_hh_l0 are of shape"),
        ("4.rnn.weight_hh_l0", (256,), r"4\.rnn\.weight_hh_l0 are of shape"),
        ("9.linear.weight", (60, 8), r"9\.linear\.bias are of shape \(64,\), where \(60,\)"),
    ],
)
def test_weights_that_do_not_go_together_are_named(
    name: str, shape: tuple[int, ...], says: str, tmp_path: Path
) -> None:
    folder = write_model(tmp_path, {**random_weights(), name: np.zeros(shape, np.float32)}, form="bonito")
    with pytest.raises(SettingsError, match=says):
        bonito.build_network(folder)


def test_as_many_scores_as_moves_between_states(tmp_path: Path) -> None:
    weights = {**random_weights(), **{f"9.linear.{part}": np.zeros((60, 8)[:n], np.float32) for part, n in PARTS}}
    with pytest.raises(SettingsError, match="60 scores, where states of 2 bases have 64"):
        bonito.build_network(write_model(tmp_path, weights, form="bonito"))


@pytest.mark.parametrize("config", [CONFIG, SERIAL], ids=["older", "layer by layer"])
def test_int8_is_near_and_does_not_depend_on_neighbours(config: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, random_weights(), form="bonito", config=config)
    exact, small = (
        onnxruntime.InferenceSession(bonito.build_network(folder, int8=int8), providers=["CPUExecutionProvider"])
        for int8 in (False, True)
    )
    x = np.random.default_rng(2).normal(0, 1, (3, 1, 400)).astype(np.float32)
    (y,), (near,) = exact.run(None, {"x": x}), small.run(None, {"x": x})
    assert 0 < np.abs(near - y).mean() < 0.05 * np.abs(y).mean()
    for scale in (0.1, 3):
        (beside,) = small.run(None, {"x": x * np.float32([[[1]], [[scale]], [[0]]])})
        assert np.array_equal(beside[:, 0], near[:, 0])


def all_paths(scores: np.ndarray, stay: float) -> Iterator[tuple[float, list[int], list[int]]]:
    """Yield score, bases and states of every path through a short CRF, by the definition of its states."""
    frames, size = scores.shape
    states = size // 4
    for first, steps in product(range(states), product(range(-1, 4), repeat=frames)):
        state, total, bases, visited = first, 0.0, [], []
        for t, base in enumerate(steps):
            if base < 0:
                total += stay
            else:
                left, state = state // (states // 4), state * 4 % states + base
                total += scores[t, 4 * state + left]
            bases.append(base + 1)
            visited.append(state)
        yield total, bases, visited


def test_decoding_is_exact() -> None:
    scores = np.random.default_rng(3).normal(0, 3, (4, 2, 64)).astype(np.float32)
    bases, sure = crf.decode(scores, 1.0)
    for i in range(2):
        paths = list(all_paths(scores[:, i], 1.0))
        best = max(paths, key=lambda path: path[0])
        assert bases[i].tolist() == best[1]
        weights = np.exp([total for total, _, _ in paths])
        probable = np.zeros((4, 16))  # of each state after each frame
        for weight, (_, _, visited) in zip(weights, paths, strict=True):
            probable[np.arange(4), visited] += weight / weights.sum()
        near = [sum(probable[t, state] for state in around(best[2][t])) for t in range(4)]
        starts = np.flatnonzero(best[1])
        for start, stop in zip(starts, [*starts[1:], 4], strict=True):
            assert sure[i, start] == pytest.approx(np.mean([p**0.4 for p in near[start:stop]]), rel=1e-4)


def around(state: int) -> set[int]:
    """Return a state of two bases, and those that can come right before or after it."""
    old, new = divmod(state, 4)
    return {state} | {4 * base + old for base in range(4)} | {4 * new + base for base in range(4)}


def test_scores_that_would_overflow_decode() -> None:
    scores = np.full((500, 1, 64), 80.0, np.float32)
    bases, sure = crf.decode(scores, STAY)
    assert (bases > 0).all()
    assert np.isfinite(sure).all()


@pytest.fixture(name="engine", scope="module")
def _engine(tmp_path_factory: pytest.TempPathFactory) -> CpuEngine:
    folder = write_model(tmp_path_factory.mktemp("model"), random_weights(), form="dorado")
    return CpuEngine(find_model(str(folder)), moves=True)


def test_a_model_directory_calls(engine: CpuEngine) -> None:
    reads = [squiggle(samples, number=n) for n, samples in enumerate((150, 4000, 4001, 30_000), 1)]
    for read, outcome in engine.basecall(reads):
        (made,) = outcome.calls
        assert made.stride == STRIDE
        assert made.moves is not None
        assert (len(made.moves), made.moves.sum()) == (read.num_samples // STRIDE, len(made.sequence))
    assert engine.identity.model == NAME


def test_where_chunks_fall_changes_a_few_bases_at_most(tmp_path: Path) -> None:
    folder = write_model(tmp_path, random_weights(), form="bonito")
    long = squiggle(40_000, run=run_info(sample_rate=4000))
    calls, seams = [], []
    for size in (6000, 4200, 9000):
        engine = CpuEngine(find_model(str(folder)))
        engine._network.chunk = size  # else the network's own
        ((_, outcome),) = engine.basecall([long])
        calls.append(outcome.calls[0].sequence)
        seams.append(long.num_samples // (size - engine._network.overlap))
    for other, here in zip(calls[1:], seams[1:], strict=True):
        assert edits(calls[0], other) <= 4 * (seams[0] + here)


def edits(one: bytes, other: bytes) -> int:
    """Return the least number of bases to change, add or leave out that make one of the other."""
    letters, steps = np.frombuffer(other, np.uint8), np.arange(len(other) + 1)
    row = steps
    for count, letter in enumerate(one, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (letters != letter))
        row = np.minimum.accumulate(np.concatenate(([count], best)) - steps) + steps
    return int(row[-1])


def test_its_name_tells_its_chemistry(tmp_path: Path) -> None:
    folder = write_model(tmp_path, random_weights(), form="bonito", config=SERIAL)
    model = find_model(str(folder))
    assert (model.fits.pores, model.fits.sample_rates, model.min_qscore) == (("R10.4.1",), (4000,), 9.0)
    assert model.scaling == ("pa", (90.0, 20.0))
    nameless = folder.rename(tmp_path / "mine")
    with pytest.raises(SettingsError, match=r"'mine' does not tell its chemistry"):
        find_model(str(nameless))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (CONFIG.replace('"lstm"', '"gru"'), r"rnn_type 'gru'.*--engine dorado"),
        (CONFIG.replace('package = "bonito.crf"', 'package = "bonito.transformer"'), "transformer.*--engine dorado"),
        (SERIAL.replace('type = "clamp"', 'type = "attention"'), "attention.*--engine dorado"),
        ("[model]\n", "no LSTM-CRF network"),
        ("qscore = 3\n" + CONFIG.replace("[qscore]", "[other]"), "no LSTM-CRF network"),
        (CONFIG.replace("blank_score = 2.0", 'blank_score = "x"'), "no LSTM-CRF network"),
        (CONFIG + "[input]\nfeatures = 13\n", "input of 13 features"),
        (SERIAL.replace("mean = 90.0", ""), "no LSTM-CRF network"),
        (SERIAL.replace("standardise = 1", "standardise = 0"), "scaling 'pa', standardisation"),
        (SERIAL.replace('strategy = "pa"', 'strategy = "new"'), "scaling 'new'"),
    ],
)
def test_other_networks_are_refused_with_the_way_out(config: str, says: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, random_weights(), form="bonito", config=config)
    with pytest.raises(SettingsError, match=says):
        find_model(str(folder))


@pytest.mark.parametrize(
    ("name", "scaling", "rates"),
    [
        ("dna_r9.4.1_e8_sup@v3.6", ("med_mad", ()), (4000,)),
        ("dna_r10.4.1_e8.2_400bps_fast@v4.0.0", ("quantile", (0.2, 0.9, 0.51, 0.53)), (4000, 5000)),
    ],
)
def test_a_model_that_does_not_tell_is_fed_as_its_pore_s_are(
    name: str, scaling: tuple[str, tuple[float, ...]], rates: tuple[int, ...], tmp_path: Path
) -> None:
    folder = write_model(tmp_path, random_weights(), form="dorado").rename(tmp_path / name)
    model = find_model(str(folder))
    assert (model.scaling, model.fits.sample_rates) == (scaling, rates)


def test_a_model_of_rna_is_refused(tmp_path: Path) -> None:
    """It would be called backwards."""
    folder = write_model(tmp_path, random_weights(), form="dorado").rename(tmp_path / "rna004_130bps_hac@v3.0.1")
    with pytest.raises(SettingsError, match=r"rna004_130bps_hac@v3\.0\.1 calls RNA, which .*--engine dorado"):
        find_model(str(folder))


def test_a_folder_without_weights_is_no_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path, {}, form="dorado")
    (folder / "weights_best.tar").touch()
    with pytest.raises(SettingsError, match=r"holds neither weights_NUMBER\.tar"):
        find_model(str(folder))


def test_empty_weights_are_listed_and_named_when_they_are_loaded(tmp_path: Path) -> None:
    folder = write_model(tmp_path, {}, form="dorado")
    (folder / "weights_1.tar").touch()
    with pytest.raises(EngineError, match=r"weights_1\.tar can't be read"):
        CpuEngine(find_model(str(folder)))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    weights = random_weights()
    del weights["6.rnn.weight_hh_l0"]
    model = find_model(str(write_model(tmp_path, weights, form="bonito")))
    with pytest.raises(EngineError, match=r"6\.rnn\.weight_hh_l0"):
        CpuEngine(model)


def test_models_are_listed_with_those_that_can_not_be_used(tmp_path: Path) -> None:
    good = write_model(tmp_path, random_weights(), form="dorado")
    bad = tmp_path / "dna_r10.4.1_e8.2_400bps_sup@v5.0.0"
    bad.mkdir()
    (bad / "config.toml").write_text('[model]\npackage = "bonito.transformer"\n')
    found = list_models([tmp_path])
    names = [model.name for model in found if isinstance(model, Model)]
    assert names[0].startswith("minnow")
    assert names[-1] == good.name
    assert [str(error) for error in found if isinstance(error, SettingsError)] == [
        f"engine.model: {bad.name} is a transformer model, which the cpu engine can't call; "
        "call it with `--engine dorado` or `--engine dorado-server`"
    ]
