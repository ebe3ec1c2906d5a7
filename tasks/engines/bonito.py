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
from tasks.engines.torch_weights import Weights, read_weights
from tasks.settings import read_toml

#: What dorado calls models that this engine can't: the way out goes into the message.
_WAY_OUT = "call it with `--engine dorado` or `--engine dorado-server`"


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
    #: `quantile` (a, b, shift multiplier, scale multiplier) or `pa` (mean, standard deviation).
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
    if "transformer" in str(config.get("model", {})).lower() or "transformer_encoder" in str(config.get("model", "")):
        raise SettingsError(f"{where} is a transformer model, which the cpu engine can't call; {_WAY_OUT}")
    encoder = config.get("encoder", {})
    try:
        layers = _serial(encoder["sublayers"]) if "sublayers" in encoder else _flat(encoder, config)
        crf = next(layer for layer in layers if layer.kind == "linearcrfencoder")
        state_length = int(crf.figures.get("state_len") or config["global_norm"]["state_len"])
        strides = [int(layer.figures["stride"]) for layer in layers if layer.kind == "convolution"]
    except (KeyError, StopIteration, TypeError, ValueError) as error:
        raise SettingsError(
            f"{where}: its config.toml describes no LSTM-CRF network that the cpu engine knows ({error!r}); {_WAY_OUT}"
        ) from error
    unknown = {layer.kind for layer in layers} - {
        "convolution",
        "permute",
        "lstm",
        "linear",
        "linearcrfencoder",
        "clamp",
    }
    if unknown:
        raise SettingsError(
            f"{where} has layers of kind {', '.join(sorted(unknown))}, which the cpu engine can't call; {_WAY_OUT}"
        )
    stay = crf.figures.get("blank_score")
    if stay is None:
        raise SettingsError(f"{where} has a score for staying per state, which the cpu engine can't call; {_WAY_OUT}")
    qscore = config.get("qscore", {})
    return Configuration(
        layers=tuple(layers),
        state_length=state_length,
        stride=int(np.prod(strides)),
        stay=float(stay),
        sample_rate=config.get("run_info", {}).get("sample_rate"),
        scaling=_scaling(config),
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
        SettingsError: weights are missing or of another shape than the configuration says, or onnx is not installed.
    """
    try:
        return _Builder(read_configuration(folder), read_weights(folder)).build(int8=int8)
    except KeyError as error:
        raise SettingsError(f"engine.model: {folder}: the weights {error} are missing") from error
    except ImportError as error:
        raise SettingsError(f"engine.model: {folder} needs the package onnx: pip install 'shoal[models]'") from error


def _serial(sublayers: list[dict[str, Any]]) -> list[Layer]:
    return [
        Layer(str(sublayer["type"]), number, {key: value for key, value in sublayer.items() if key != "type"})
        for number, sublayer in enumerate(sublayers)
    ]


def _flat(encoder: dict[str, Any], config: dict[str, Any]) -> list[Layer]:
    """Spell out the layers of the older form, which gives only their figures."""
    features, window, stride = int(encoder["features"]), int(encoder["winlen"]), int(encoder["stride"])
    activation = str(encoder["activation"])
    sizes = ((1, 4, 5, 1), (4, 16, 5, 1), (16, features, window, stride))
    layers = [
        Layer("convolution", i, {"size": size, "winlen": winlen, "stride": step, "padding": winlen // 2})
        for i, (_, size, winlen, step) in enumerate(sizes)
    ]
    for layer in layers:
        layer.figures["activation"] = activation
    layers.append(Layer("permute", 3, {"dims": [2, 0, 1]}))
    if encoder["rnn_type"] != "lstm":
        raise ValueError(f"rnn_type {encoder['rnn_type']!r}")
    layers += [Layer("lstm", 4 + i, {"size": features, "reverse": 1 - i % 2}) for i in range(5)]
    figures = {
        "state_len": int(config["global_norm"]["state_len"]),
        "blank_score": encoder.get("blank_score"),
        "scale": encoder.get("scale"),
        "activation": "tanh",
    }
    return [*layers, Layer("linearcrfencoder", 9, figures)]


def _scaling(config: dict[str, Any]) -> tuple[str, tuple[float, ...]]:
    standard = config.get("standardisation", {})
    if config.get("scaling", {}).get("strategy") == "pa" and standard.get("standardise"):
        return "pa", (float(standard["mean"]), float(standard["stdev"]))
    given = config.get("normalisation", {})
    names = (("quantile_a", 0.2), ("quantile_b", 0.9), ("shift_multiplier", 0.51), ("scale_multiplier", 0.53))
    return "quantile", tuple(float(given.get(name, default)) for name, default in names)


class _Builder:
    """Writes the graph layer by layer."""

    def __init__(self, configuration: Configuration, weights: Weights) -> None:
        import onnx  # only for models of this form

        self._onnx = onnx
        self._configuration = configuration
        self._weights = weights
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._named = 0

    def build(self, *, int8: bool) -> bytes:
        make, types = self._onnx.helper, self._onnx.TensorProto
        last = "x"
        for layer in self._configuration.layers:
            last = getattr(self, f"_{layer.kind}")(last, layer)
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
        name = f"{layer.number}.conv"
        weight = self._weights[f"{name}.weight"]
        bias = self._weights.get(f"{name}.bias", np.zeros(len(weight), np.float32))
        norm = f"{layer.number}.norm"
        if f"{norm}.running_var" in self._weights:
            gain = self._weights[f"{norm}.weight"] / np.sqrt(self._weights[f"{norm}.running_var"] + 1e-5)
            bias = (bias - self._weights[f"{norm}.running_mean"]) * gain + self._weights[f"{norm}.bias"]
            weight = weight * gain[:, None, None]
        return weight, bias

    def _permute(self, x: str, layer: Layer) -> str:
        return self._node("Transpose", [x], perm=list(layer.figures["dims"]))

    def _lstm(self, x: str, layer: Layer) -> str:
        name = f"{layer.number}.rnn"
        hidden = self._weights[f"{name}.weight_hh_l0"].shape[1]
        # PyTorch's gates are input, forget, cell, output; ONNX's input, output, forget, cell.
        order = np.r_[0:hidden, 3 * hidden : 4 * hidden, hidden : 2 * hidden, 2 * hidden : 3 * hidden]
        none = np.zeros(4 * hidden, np.float32)
        biases = [self._weights.get(f"{name}.bias_{way}_l0", none)[order] for way in ("ih", "hh")]
        inputs = [self._weights[f"{name}.weight_{way}_l0"][order][None] for way in ("ih", "hh")]
        y = self._node(
            "LSTM",
            [x, *map(self._constant, inputs), self._constant(np.concatenate(biases)[None])],
            hidden_size=hidden,
            direction="reverse" if layer.figures.get("reverse") else "forward",
        )
        return self._node("Squeeze", [y, self._constant(np.array([1], np.int64))])

    def _linear(self, x: str, layer: Layer) -> str:
        name = f"{layer.number}.linear" if f"{layer.number}.linear.weight" in self._weights else str(layer.number)
        y = self._node("MatMul", [x, self._constant(np.ascontiguousarray(self._weights[f"{name}.weight"].T))])
        bias = self._weights.get(f"{name}.bias")
        return y if bias is None else self._node("Add", [y, self._constant(bias)])

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
        raise SettingsError(f"engine.model: the activation {activation!r} is not known; {_WAY_OUT}")

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
