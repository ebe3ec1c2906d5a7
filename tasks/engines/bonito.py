"""Model directories of ONT's LSTM-CRF models, as bonito and dorado have them (v3.5 to v4.3): config.toml and weights.

The network is built anew as an ONNX graph, for onnxruntime. Layers: nanoporetech/bonito, `bonito.nn` and `bonito.crf`
(names and meaning of the configuration's keys).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.core.errors import SettingsError
from tasks.engines.int8 import quantised
from tasks.engines.torch_weights import Weights, is_numbered_densely, read_weights
from tasks.settings import read_toml

#: What to do with a model that this engine can't call.
WAY_OUT = "call it with `--engine dorado` or `--engine dorado-server`"

_LAYERS = {"convolution", "permute", "lstm", "linear", "linearcrfencoder", "clamp"}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the encoder: its kind, its figures, and its number in the names of weights."""

    kind: str
    number: int
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What config.toml tells."""

    layers: tuple[Layer, ...]
    state_length: int
    stride: int
    #: Score of staying.
    stay: float
    #: Hz; None where the file does not say (models of 4 kHz, which call 5 kHz as it is).
    sample_rate: int | None
    #: Strategy and figures (`tasks.engines.cpu.middle_and_spread`).
    scaling: tuple[str, tuple[float, ...]]
    #: Slope and offset from the network's own Phred score to the observed one.
    qscore: tuple[float, float]


def is_model_directory(folder: Path) -> bool:
    """Tell whether a folder looks like one of ONT's model directories."""
    return (folder / "config.toml").is_file()


def read_configuration(folder: Path) -> Configuration:
    """Read config.toml.

    Raises:
        SettingsError: it can't be read, or describes a network that this engine does not know.
    """
    config = read_toml(folder / "config.toml")
    where = f"engine.model: {folder.name}"
    if "transformer" in str(config.get("model", {})).lower():
        raise SettingsError(f"{where} is a transformer model, which the cpu engine can't call; {WAY_OUT}")
    try:
        return _configuration(config, folder)
    except (AttributeError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise SettingsError(
            f"{where}: its config.toml describes no LSTM-CRF network that the cpu engine knows ({error!r}); {WAY_OUT}"
        ) from error


def _configuration(config: dict[str, Any], folder: Path) -> Configuration:
    """Make sense of config.toml; what can't be made sense of raises as Python has it."""
    encoder = config["encoder"]
    if "sublayers" in encoder:
        layers = _serial(encoder["sublayers"], dense=is_numbered_densely(folder))
    else:
        layers = _flat(encoder, config)
    unknown = {layer.kind for layer in layers} - _LAYERS
    if unknown:
        raise SettingsError(
            f"engine.model: {folder.name} has layers of kind {', '.join(sorted(unknown))}, which the cpu engine can't "
            f"call; {WAY_OUT}"
        )
    if (features := int(config.get("input", {}).get("features", 1))) != 1:
        raise ValueError(f"input of {features} features")
    crf = next(layer for layer in layers if layer.kind == "linearcrfencoder")
    stay = crf.figures.get("blank_score")
    if stay is None:
        raise SettingsError(
            f"engine.model: {folder.name} has a score for staying per state, which the cpu engine can't call; {WAY_OUT}"
        )
    rate = config.get("run_info", {}).get("sample_rate")
    qscore = config.get("qscore", {})
    return Configuration(
        layers=tuple(layers),
        state_length=int(crf.figures.get("state_len") or config["global_norm"]["state_len"]),
        stride=int(np.prod([int(layer.figures["stride"]) for layer in layers if layer.kind == "convolution"])),
        stay=float(stay),
        sample_rate=None if rate is None else int(rate),
        scaling=_scaling(config, folder.resolve().name),
        qscore=(float(qscore.get("scale", 1.0)), float(qscore.get("bias", 0.0))),
    )


def directory_digest(folder: Path) -> str:
    """Return sha256 over the names and contents of a model directory's files, hex."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".toml", ".tar", ".tensor"):
            digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def build_network(folder: Path, *, int8: bool = False) -> bytes:
    """Build the ONNX graph of a model directory: `x` float32 (batch, 1, samples) to `y` (frames, batch, 4^(k+1)).

    Args:
        int8: Quantise recurrent and linear layers (int8.py).

    Raises:
        SettingsError: weights are missing or of shapes that do not go together.
    """
    try:
        return _Builder(str(folder), read_configuration(folder), read_weights(folder)).build(int8=int8)
    except KeyError as error:
        raise SettingsError(f"engine.model: {folder}: the weights {error} are missing") from error


def _serial(sublayers: list[dict[str, Any]], *, dense: bool) -> list[Layer]:
    """Read the layers of the newer form.

    Args:
        dense: Weights are numbered as if there were no clamps.
    """
    layers, number = [], 0
    for sublayer in sublayers:
        figures = {key: value for key, value in sublayer.items() if key != "type"}
        layers.append(Layer(str(sublayer["type"]), number, figures))
        number += not (dense and sublayer["type"] == "clamp")
    return layers


def _flat(encoder: dict[str, Any], config: dict[str, Any]) -> list[Layer]:
    """Spell out the layers of the older form, which gives only their figures."""
    activation = str(encoder["activation"])
    layers = [
        Layer("convolution", i, {"stride": stride, "activation": activation})
        for i, stride in enumerate((1, 1, int(encoder["stride"])))
    ]
    layers.append(Layer("permute", 3, {"dims": [2, 0, 1]}))
    if encoder["rnn_type"] != "lstm":
        raise ValueError(f"rnn_type {encoder['rnn_type']!r}")
    layers += [Layer("lstm", 4 + i, {"reverse": 1 - i % 2}) for i in range(5)]
    figures = {
        "state_len": int(config["global_norm"]["state_len"]),
        "blank_score": encoder.get("blank_score"),
        "scale": encoder.get("scale"),
        "activation": "tanh",
    }
    return [*layers, Layer("linearcrfencoder", 9, figures)]


def _scaling(config: dict[str, Any], name: str) -> tuple[str, tuple[float, ...]]:
    """Return strategy and figures; models of R9.4.1 that name none have `med_mad`, others `quantile`, as in dorado."""
    usual = "med_mad" if name.startswith("dna_r9.4.1") else "quantile"
    strategy = config.get("scaling", {}).get("strategy", usual)
    if strategy == "med_mad":
        return strategy, ()
    if strategy == "quantile":
        given = config.get("normalisation", {})
        names = (("quantile_a", 0.2), ("quantile_b", 0.9), ("shift_multiplier", 0.51), ("scale_multiplier", 0.53))
        return strategy, tuple(float(given.get(name, default)) for name, default in names)
    standard = config.get("standardisation", {})
    if strategy == "pa" and standard.get("standardise"):
        return strategy, (float(standard["mean"]), float(standard["stdev"]))
    raise ValueError(f"scaling {strategy!r}, standardisation {standard!r}")


class _Builder:
    """Writes the graph layer by layer."""

    def __init__(self, name: str, configuration: Configuration, weights: Weights) -> None:
        import onnx  # only for models of this form

        self._name = name
        self._onnx = onnx
        self._configuration = configuration
        self._weights = weights
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._named = 0
        #: Channels of what the layers so far put out.
        self._width = 1

    def build(self, *, int8: bool) -> bytes:
        make, types = self._onnx.helper, self._onnx.TensorProto
        last = "x"
        for layer in self._configuration.layers:
            last = getattr(self, f"_{layer.kind}")(last, layer)
        if self._width != 4 ** (self._configuration.state_length + 1):
            raise SettingsError(
                f"engine.model: {self._name}: the weights make {self._width} scores, where states of "
                f"{self._configuration.state_length} bases have {4 ** (self._configuration.state_length + 1)}"
            )
        self._nodes.append(make.make_node("Identity", [last], ["y"]))
        graph = make.make_graph(
            self._nodes,
            "network",
            [make.make_tensor_value_info("x", types.FLOAT, ["batch", 1, "samples"])],
            [make.make_tensor_value_info("y", types.FLOAT, ["frames", "batch", "scores"])],
            self._constants,
        )
        model = make.make_model(graph, opset_imports=[make.make_opsetid("", 14)])
        model.ir_version = 8
        self._onnx.checker.check_model(model)
        return quantised(model) if int8 else bytes(model.SerializeToString())

    def _convolution(self, x: str, layer: Layer) -> str:
        weight, bias = self._folded(layer)
        padding = int(layer.figures.get("padding", weight.shape[2] // 2))
        y = self._node(
            "Conv",
            [x, self._constant(weight), self._constant(bias)],
            kernel_shape=[weight.shape[2]],
            strides=[int(layer.figures["stride"])],
            pads=[padding, padding],
        )
        return self._activated(y, layer)

    def _folded(self, layer: Layer) -> tuple[Any, Any]:
        """Return the weights of a convolution with its batch normalisation in them, where it has one."""
        name, norm = f"{layer.number}.conv", f"{layer.number}.norm"
        weight = self._weight(f"{name}.weight", None, self._width, layer.figures.get("winlen"))
        self._width = width = len(weight)
        bias = self._weight(f"{name}.bias", width, missing=0)
        if f"{norm}.running_var" in self._weights:
            mean, variance, scale, shift = (
                self._weight(f"{norm}.{part}", width) for part in ("running_mean", "running_var", "weight", "bias")
            )
            gain = scale / np.sqrt(variance + 1e-5)
            bias = (bias - mean) * gain + shift
            weight = weight * gain[:, None, None]
        return weight, bias

    def _permute(self, x: str, layer: Layer) -> str:
        return self._node("Transpose", [x], perm=list(layer.figures["dims"]))

    def _lstm(self, x: str, layer: Layer) -> str:
        name = f"{layer.number}.rnn"
        within = self._weight(f"{name}.weight_hh_l0", None, None)
        hidden = within.shape[1]
        weights = [
            self._weight(f"{name}.weight_{way}_l0", 4 * hidden, n) for way, n in (("ih", self._width), ("hh", hidden))
        ]
        biases = [self._weight(f"{name}.bias_{way}_l0", 4 * hidden, missing=0) for way in ("ih", "hh")]
        self._width = hidden
        # PyTorch's gates are input, forget, cell, output; ONNX's input, output, forget, cell.
        order = np.r_[0:hidden, 3 * hidden : 4 * hidden, hidden : 2 * hidden, 2 * hidden : 3 * hidden]
        inputs = [*(weight[order][None] for weight in weights), np.concatenate([bias[order] for bias in biases])[None]]
        y = self._node(
            "LSTM",
            [x, *map(self._constant, inputs)],
            hidden_size=hidden,
            direction="reverse" if layer.figures.get("reverse") else "forward",
        )
        return self._node("Squeeze", [y, self._constant(np.array([1], np.int64))])

    def _linear(self, x: str, layer: Layer) -> str:
        name = f"{layer.number}.linear" if f"{layer.number}.linear.weight" in self._weights else str(layer.number)
        weight = self._weight(f"{name}.weight", None, self._width)
        self._width = len(weight)
        y = self._node("MatMul", [x, self._constant(np.ascontiguousarray(weight.T))])
        if f"{name}.bias" not in self._weights:
            return y
        return self._node("Add", [y, self._constant(self._weight(f"{name}.bias", self._width))])

    def _linearcrfencoder(self, x: str, layer: Layer) -> str:
        y = self._activated(self._linear(x, layer), layer)
        scale = layer.figures.get("scale")
        return self._node("Mul", [y, self._constant(np.float32(scale))]) if scale else y

    def _clamp(self, x: str, layer: Layer) -> str:
        bounds = [self._constant(np.float32(layer.figures[name])) for name in ("min", "max")]
        return self._node("Clip", [x, *bounds])

    def _activated(self, x: str, layer: Layer) -> str:
        activation = layer.figures.get("activation")
        if not activation:
            return x
        if activation == "tanh":
            return self._node("Tanh", [x])
        if activation in ("swish", "swish_clamp"):
            y = self._node("Mul", [x, self._node("Sigmoid", [x])])
            if activation == "swish":
                return y
            return self._node("Clip", [y, "", self._constant(np.float32(3.5))])
        raise SettingsError(f"engine.model: the activation {activation!r} is not known; {WAY_OUT}")

    def _weight(self, name: str, *shape: int | None, missing: float | None = None) -> Any:
        """Return weights of a shape, where None stands for any size; with `missing` they may be."""
        if missing is not None and name not in self._weights:
            return np.full(shape, missing, np.float32)
        weights = self._weights[name]
        sizes = [size or here for size, here in zip(shape, weights.shape, strict=False)]
        if len(shape) != weights.ndim or sizes != list(weights.shape):
            wanted = tuple("any" if size is None else size for size in shape)
            raise SettingsError(
                f"engine.model: {self._name}: the weights {name} are of shape {weights.shape}, where "
                f"{wanted} go together with the others"
            )
        return weights

    def _constant(self, value: Any) -> str:
        self._named += 1
        name = f"k{self._named}"
        self._constants.append(self._onnx.numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def _node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        self._named += 1
        name = f"t{self._named}"
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [name], **attributes))
        return name
