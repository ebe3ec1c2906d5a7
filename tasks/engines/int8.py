"""Quantises a recurrent ONNX network to int8, such that a chunk's result still depends on that chunk alone.

onnxruntime finds the scale of what goes into a quantised layer while it runs, from all chunks that go through at once.
Here two channels more, which always stand at the bounds, keep that scale the same. LSTMs put out what lies between -1
and 1; the bounds of what goes into the first are found by a made-up squiggle, beforehand, and kept by clipping.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

#: Of channels that stand still: a gate's bias that keeps it open (closed with a minus), a cell whose tanh is 1.
_OPEN, _CELL = 30.0, 20.0
_BOUNDS = np.array([-1, 1], np.float32)
#: Quantile of what a made-up squiggle sends into the first LSTM that is its bound: real signal seldom goes beyond.
_QUANTILE = 0.9999


def quantised(model: Any) -> bytes:
    """Return an ONNX model whose LSTMs, and linear layers behind them, have int8 weights, one scale per row.

    Weights have 7 bits: with 8, sums overflow on CPUs without VNNI.

    Args:
        model: An onnx.ModelProto with input `x`, float32 (batch, 1, samples), of a standard deviation of about 1. Its
            LSTMs have one direction, constant weights and no initial state. It is changed.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    named = _Bounding(model).bounded()
    with TemporaryDirectory() as folder:
        target = Path(folder, "int8.onnx")
        quantize_dynamic(
            model,
            target,
            nodes_to_quantize=named,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
        return target.read_bytes()


def made_up_squiggle() -> npt.NDArray[np.float32]:
    """Return signal of 16 chunks, (16, 1, 4000): levels of ten samples each, and noise."""
    random = np.random.default_rng(0)
    levels = np.repeat(random.normal(0, 1, (16, 400)), 10, axis=1)
    signal: npt.NDArray[np.float32] = (levels + random.normal(0, 0.15, levels.shape)).astype(np.float32)
    return signal[:, None]


class _Bounding:
    """Puts the two channels into a graph's LSTMs."""

    def __init__(self, model: Any) -> None:
        import onnx  # only where networks are quantised

        self._onnx = onnx
        self._original = onnx.ModelProto()
        self._original.CopyFrom(model)
        self._graph = model.graph
        self._constants = {tensor.name: tensor for tensor in self._graph.initializer}
        self._nodes: list[Any] = []

    def bounded(self) -> list[str]:
        """Change the graph; return the names of the nodes that can be quantised."""
        changed: dict[str, tuple[str, int]] = {}  # value: its name with the two channels, and how many it has without
        named: list[Any] = []
        for node in list(self._graph.node):
            if node.op_type == "Squeeze" and node.input[0] in changed:
                wide, width = changed[node.input[0]]
                changed[node.output[0]] = node.output[0] + "_wide", width
                node.input[0] = wide
                node.output[0] += "_wide"
            elif node.op_type == "LSTM":
                if node.input[0] in changed:
                    node.input[0] = changed[node.input[0]][0]
                else:
                    node.input[0] = self._padded(node.input[0])
                width = self._widen(node)
                changed[node.output[0]] = node.output[0] + "_wide", width
                node.output[0] += "_wide"
                named.append(node)
            elif node.op_type == "MatMul" and node.input[0] in changed and node.input[1] in self._constants:
                node.input[0] = changed[node.input[0]][0]
                weights = np.pad(self._value(node.input[1]), ((0, 2), (0, 0)))
                node.input[1] = self._constant(f"{node.output[0]}_weights", weights)
                named.append(node)
            else:
                for i, name in enumerate(node.input):
                    if name in changed:
                        node.input[i] = self._narrow(*changed[name])
            self._nodes.append(node)
        for number, node in enumerate(named):
            node.name = f"quantised{number}"
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        return [node.name for node in named]

    def _padded(self, name: str) -> str:
        """Clip a value of shape (frames, batch, channels) to its bounds, and add a channel at each of them."""
        seen = self._seen(name)
        bounds = [np.array(bound, np.float32) for bound in (seen.min(), np.quantile(seen, _QUANTILE))]
        constants = [self._constant(f"{name}_bound{number}", bound) for number, bound in enumerate(bounds)]
        self._node("Clip", [name, *constants], f"{name}_clipped")
        pads = self._constant(f"{name}_pads", np.array([0, 0, 0, 0, 0, 1], np.int64))
        self._node("Pad", [f"{name}_clipped", pads, constants[0]], f"{name}_low")
        self._node("Pad", [f"{name}_low", pads, constants[1]], f"{name}_wide")
        return f"{name}_wide"

    def _seen(self, name: str) -> npt.NDArray[np.float32]:
        """Return what a value is for a made-up squiggle."""
        self._original.graph.output.append(self._onnx.helper.make_empty_tensor_value_info(name))
        session = onnxruntime.InferenceSession(self._original.SerializeToString(), providers=["CPUExecutionProvider"])
        (seen,) = session.run([name], {"x": made_up_squiggle()})
        found: npt.NDArray[np.float32] = seen
        return found

    def _narrow(self, name: str, width: int) -> str:
        """Take the two channels away again, for what is no LSTM."""
        narrow = f"{name}_narrow"
        figures = (("start", 0), ("stop", width), ("axis", 2))
        inputs = [self._constant(f"{narrow}_{title}", np.array([figure], np.int64)) for title, figure in figures]
        self._node("Slice", [name, *inputs], narrow)
        return narrow

    def _widen(self, node: Any) -> int:
        """Give an LSTM two input channels more, and two cells that stand at -1 and 1; return its old width."""
        into, within, bias = (self._value(name) for name in node.input[1:4])
        width = within.shape[2]
        gates = (1, 4, width)
        into = np.pad(into.reshape(*gates, -1), ((0, 0), (0, 0), (0, 2), (0, 2)))
        within = np.pad(within.reshape(*gates, -1), ((0, 0), (0, 0), (0, 2), (0, 2)))
        still = np.array([-_OPEN, _OPEN, _OPEN, 0], np.float32)  # input, output, forget, cell
        first, second = np.pad(bias.reshape(2, 4, width), ((0, 0), (0, 0), (0, 2)))
        first[:, width:] = still[:, None]
        weights = (
            into.reshape(1, 4 * (width + 2), -1),
            within.reshape(1, 4 * (width + 2), -1),
            np.concatenate((first.ravel(), second.ravel()))[None],
        )
        names = [self._constant(f"{node.output[0]}_{i}", value) for i, value in enumerate(weights)]
        states = [self._state(node, end, width) for end in (_BOUNDS, _BOUNDS * np.float32(_CELL))]
        inputs = [node.input[0], *names, "", *states]
        del node.input[:]
        node.input.extend(inputs)
        for attribute in node.attribute:
            if attribute.name == "hidden_size":
                attribute.i = width + 2
        return int(width)

    def _state(self, node: Any, end: npt.NDArray[np.float32], width: int) -> str:
        """Make an initial state: 0, but for the two cells more; of shape (1, batch, width + 2)."""
        name = f"{node.output[0]}_state{float(end[1]):g}"
        state = self._constant(f"{name}_one", np.concatenate((np.zeros(width, np.float32), end))[None, None])
        one = self._constant(f"{name}_1", np.ones(1, np.int64))
        self._node("Shape", [node.input[0]], f"{name}_shape")
        self._node("Gather", [f"{name}_shape", one], f"{name}_batch", axis=0)
        self._node("Concat", [one, f"{name}_batch", one], f"{name}_size", axis=0)
        self._node("Expand", [state, f"{name}_size"], name)
        return name

    def _value(self, name: str) -> npt.NDArray[Any]:
        value: npt.NDArray[Any] = self._onnx.numpy_helper.to_array(self._constants[name])
        return value

    def _constant(self, name: str, value: npt.NDArray[Any]) -> str:
        tensor = self._onnx.numpy_helper.from_array(np.asarray(value, order="C"), name)
        self._constants[name] = tensor
        self._graph.initializer.append(tensor)
        return name

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [output], **attributes))
