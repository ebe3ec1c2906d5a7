"""Writes trained networks as the int8 ONNX file that the product ships: `-m infra.training.export --help`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from tasks.engines.int8 import quantised


def export(state: dict[str, Any], layers: int, blank: float) -> onnx.ModelProto:
    """Build the graph: `x` float32 (batch, 1, samples) to `y` (batch, samples / 3, 5), probabilities of NACGT.

    The odds of a blank are multiplied by `blank`: CTC's loss makes networks that are unsure leave bases out.
    """
    weights = {name: value.numpy() for name, value in state.items()}
    weights["out.bias"] = weights["out.bias"] + np.log(blank, dtype=np.float32) * (np.arange(10) % 5 == 0)
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(value: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, order="C"), f"k{len(constants)}"))
        return str(constants[-1].name)

    def node(kind: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [f"t{len(nodes)}"], **attributes))
        return f"t{len(nodes) - 1}"

    x = "x"
    for number, (stride, padding) in enumerate(((1, 2), (3, 6), (2, 4)), 1):
        gain = weights[f"norm{number}.weight"] / np.sqrt(weights[f"norm{number}.running_var"] + 1e-5)
        bias = weights[f"norm{number}.bias"] - weights[f"norm{number}.running_mean"] * gain
        kernel = weights[f"conv{number}.weight"] * gain[:, None, None]
        x = node("Conv", x, constant(kernel), constant(bias), strides=[stride], pads=[padding, padding])
        x = node("Mul", x, node("Sigmoid", x))
    x = node("Transpose", x, perm=[2, 0, 1])
    for number in range(layers):
        name = f"lstm.{number}"
        width = weights[f"{name}.weight_hh_l0"].shape[1]
        # PyTorch's gates are input, forget, cell, output; ONNX's input, output, forget, cell.
        order = np.r_[0:width, 3 * width : 4 * width, width : 2 * width, 2 * width : 3 * width]
        inputs = [constant(weights[f"{name}.weight_{way}_l0"][order][None]) for way in ("ih", "hh")]
        biases = np.concatenate([weights[f"{name}.bias_{way}_l0"][order] for way in ("ih", "hh")])[None]
        direction = "forward" if number % 2 else "reverse"
        x = node("LSTM", x, *inputs, constant(biases), hidden_size=width, direction=direction)
        x = node("Squeeze", x, constant(np.array([1], np.int64)))
    x = node("Add", node("MatMul", x, constant(weights["out.weight"].T)), constant(weights["out.bias"]))
    x = node("Reshape", node("Transpose", x, perm=[1, 0, 2]), constant(np.array([0, -1, 5], np.int64)))
    nodes.append(helper.make_node("Softmax", [x], ["y"], axis=2))
    graph = helper.make_graph(
        nodes,
        "minnow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, "samples"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "frames", 5])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model


def mean(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of networks, in float32: better than each, where their trainings ended in one basin.

    How many batches normalisation has seen is left out: nothing asks for it, and half precision ends at 65,504.
    """
    names = [name for name in states[-1] if not name.endswith("num_batches_tracked")]
    return {name: torch.stack([state[name].float() for state in states]).mean(0) for name in names}


def main() -> None:
    """Export checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="of one training: the mean of their weights is taken")
    parser.add_argument("file", type=Path)
    parser.add_argument("--blank", type=float, default=0.6, help="chosen on the validation reads")
    parser.add_argument("--slim", type=Path, help="also write what a training can go on from, in half precision")
    given = parser.parse_args()
    loaded = [torch.load(checkpoint, weights_only=True) for checkpoint in given.checkpoints]
    kept = {**loaded[-1], "network": mean([one["network"] for one in loaded])}
    model = export(kept["network"], kept["settings"]["layers"], given.blank)
    given.file.write_bytes(quantised(model))
    if given.slim:
        half = {name: value.half() for name, value in kept["network"].items()}
        torch.save({**kept, "network": half, "optimisers": []}, given.slim)


if __name__ == "__main__":
    main()
