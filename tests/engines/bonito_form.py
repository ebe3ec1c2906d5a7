"""Small random models in the two on-disk forms of ONT's, written without PyTorch, and their forward pass in numpy."""

from __future__ import annotations

import io
import pickle
import sys
import types
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FEATURES, STATE_LENGTH, STRIDE, STAY, SCALE = 8, 2, 5, 2.0, 5.0
NAME = "dna_r10.4.1_e8.2_400bps_hac@v3.5.2"
Arrays = dict[str, np.ndarray]


def config_of(features: int = FEATURES, state_length: int = STATE_LENGTH) -> str:
    """Write the config.toml of a network."""
    return f"""
[model]
package = "bonito.crf"
[global_norm]
state_len = {state_length}
[qscore]
scale = 1.1
bias = -0.5
[encoder]
activation = "swish"
rnn_type = "lstm"
features = {features}
stride = {STRIDE}
winlen = 19
scale = {SCALE}
blank_score = {STAY}
"""


CONFIG = config_of()


def random_weights(seed: int = 1, features: int = FEATURES, state_length: int = STATE_LENGTH) -> Arrays:
    """Make the weights of a network: three convolutions, five LSTM layers, the CRF's linear layer."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for i, (inside, outside, width) in enumerate(((1, 4, 5), (4, 16, 5), (16, features, 19))):
        shapes |= {f"{i}.conv.weight": (outside, inside, width), f"{i}.conv.bias": (outside,)}
    for i in range(4, 9):
        for way in ("ih", "hh"):
            shapes |= {f"{i}.rnn.weight_{way}_l0": (4 * features, features), f"{i}.rnn.bias_{way}_l0": (4 * features,)}
    size = 4 ** (state_length + 1)
    shapes |= {"9.linear.weight": (size, features), "9.linear.bias": (size,)}
    return {
        name: random.normal(0, 0.6 * (FEATURES / features) ** 0.5, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_model(folder: Path, weights: Arrays, *, form: str, config: str = CONFIG) -> Path:
    """Write a model directory as bonito or dorado does."""
    target = folder / NAME
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.toml").write_text(config)
    if form == "bonito":
        write_archive(target / "weights_1.tar", {f"encoder.{name}": value for name, value in weights.items()})
    else:
        for name, value in weights.items():
            write_archive(target / f"{name}.tensor", {"0": value}, module=True)
    return target


@dataclass(frozen=True)
class Repeated:
    """A tensor that shows one number of its storage again and again."""

    value: np.ndarray
    times: int


def write_archive(path: Path, arrays: dict[str, Any], *, module: bool = False) -> None:
    """Write what `torch.save` writes of a state dict, or `torch.jit.save` of a module with parameters."""
    storages: list[bytes] = []
    with _fake_torch(storages) as (tensor, scripted, pickler):
        content = {
            name: tensor(value) if isinstance(value, np.ndarray | Repeated) else value for name, value in arrays.items()
        }
        stream = io.BytesIO()
        pickler(stream, 2).dump(scripted(content) if module else content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", stream.getvalue())
        for number, storage in enumerate(storages):
            archive.writestr(f"archive/data/{number}", storage)


class _fake_torch:  # noqa: N801
    """Modules by the names that pickles of PyTorch's refer to, for as long as one is written."""

    def __init__(self, storages: list[bytes]) -> None:
        self._storages = storages

    def __enter__(self) -> tuple[Any, Any, Any]:
        names = ("torch", "torch._utils", "__torch__", "__torch__.Module")
        self._modules = {name: types.ModuleType(name) for name in names}
        storage_type = type("FloatStorage", (), {"__module__": "torch"})

        def _rebuild_tensor_v2(*given: object) -> None:
            """Stand for PyTorch's function of that name."""

        _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
        self._modules["torch"].FloatStorage = storage_type  # type: ignore[attr-defined]
        self._modules["torch._utils"]._rebuild_tensor_v2 = _rebuild_tensor_v2  # type: ignore[attr-defined]
        storages = self._storages

        class Storage:
            def __init__(self, content: bytes) -> None:
                self.key, self.count = str(len(storages)), len(content) // 4
                storages.append(content)

        class Tensor:
            def __init__(self, given: np.ndarray | Repeated) -> None:
                value = given.value if isinstance(given, Repeated) else given
                self.shape = value.shape
                self.strides = tuple(int(np.prod(self.shape[i + 1 :])) for i in range(len(self.shape)))
                if isinstance(given, Repeated):
                    self.shape, self.strides = (given.times,), (0,)
                self.storage = Storage(np.ascontiguousarray(value, np.float32).tobytes())

            def __reduce__(self) -> Any:
                return _rebuild_tensor_v2, (self.storage, 0, self.shape, self.strides, False, None)

        class Scripted:
            def __init__(self, state: dict[str, Any]) -> None:
                self.__dict__.update(state)

        Scripted.__module__, Scripted.__qualname__ = "__torch__.Module", "Scripted"
        self._modules["__torch__.Module"].Scripted = Scripted  # type: ignore[attr-defined]

        class Pickler(pickle.Pickler):
            def persistent_id(self, given: object) -> Any:
                if isinstance(given, Storage):
                    return "storage", storage_type, given.key, "cpu", given.count
                return None

        self._hidden = {name: sys.modules.get(name) for name in self._modules}
        sys.modules.update(self._modules)
        return Tensor, Scripted, Pickler

    def __exit__(self, *error: object) -> None:
        for name, module in self._hidden.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def forward(weights: Arrays, x: np.ndarray) -> np.ndarray:
    """Compute the network's scores (frames, batch, moves) of signal (batch, samples), in plain numpy."""
    y = x[:, None].astype(np.float64)
    for i, step in enumerate((1, 1, STRIDE)):
        w = weights[f"{i}.conv.weight"]
        half = w.shape[2] // 2
        padded = np.pad(y, ((0, 0), (0, 0), (half, half)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2], axis=2)[:, :, ::step]
        y = np.einsum("bitk,oik->bot", windows, w) + weights[f"{i}.conv.bias"][:, None]
        y = y * _sigmoid(y)
    y = y.transpose(2, 0, 1)
    for i in range(4, 9):
        backwards = i % 2 == 0
        gates = y @ weights[f"{i}.rnn.weight_ih_l0"].T + weights[f"{i}.rnn.bias_ih_l0"] + weights[f"{i}.rnn.bias_hh_l0"]
        hidden = cell = np.zeros(y.shape[1:])
        out = np.empty_like(y)
        for t in range(len(y))[:: -1 if backwards else 1]:
            into, forget, new, show = np.split(gates[t] + hidden @ weights[f"{i}.rnn.weight_hh_l0"].T, 4, axis=1)
            cell = _sigmoid(forget) * cell + _sigmoid(into) * np.tanh(new)
            hidden = _sigmoid(show) * np.tanh(cell)
            out[t] = hidden
        y = out
    return SCALE * np.tanh(y @ weights["9.linear.weight"].T + weights["9.linear.bias"])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
