"""Weights that PyTorch saved, read without PyTorch and without running what is in them.

Both forms are zip files with a pickle that names tensors and one file per tensor's storage: a state dict (`torch.save`,
bonito's `weights_*.tar`), and a scripted module per tensor (`torch.jit.save`, dorado's folder of `*.tensor`). A pickle
can name any function; this reader knows the three that tensors need, and refuses the rest by name.
Format: PyTorch's serialization notes ("torch.save serialized file format").
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.core.errors import SettingsError

Weights = dict[str, npt.NDArray[np.float32]]

_CHECKPOINT = re.compile(r"weights_(\d+)\.tar")
_TYPES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "BoolStorage": np.bool_,
}


def read_weights(folder: Path) -> Weights:
    """Read the weights of a model directory, in bonito's form or dorado's.

    Returns:
        Tensors as float32, by bonito's names without the leading `encoder.`: `0.conv.weight`, `4.rnn.bias_ih_l0`, …

    Raises:
        SettingsError: there are none, or they can't be read; names the file.
    """
    files = find_weights(folder)
    if is_numbered_densely(folder):
        named = {file.stem: _only_tensor(file) for file in files}
    else:
        state = _load(files[-1])
        if not isinstance(state, dict):
            raise SettingsError(f"{files[-1]} holds no state dict")
        named = {str(name): value for name, value in state.items()}
    return {
        name.removeprefix("encoder."): value.astype(np.float32)
        for name, value in named.items()
        if isinstance(value, np.ndarray)
    }


def find_weights(folder: Path) -> list[Path]:
    """Return the files with weights: bonito's checkpoints, the last one last, or dorado's files of a tensor each.

    Raises:
        SettingsError: there are none.
    """
    numbered = [(file, _CHECKPOINT.fullmatch(file.name)) for file in folder.glob("weights_*.tar")]
    checkpoints = sorted((int(match[1]), file) for file, match in numbered if match)
    files = [file for _, file in checkpoints] or sorted(folder.glob("*.tensor"))
    if not files:
        raise SettingsError(
            f"engine.model: {folder} holds neither weights_NUMBER.tar (bonito) nor *.tensor files (dorado)"
        )
    return files


def is_numbered_densely(folder: Path) -> bool:
    """Tell whether weights are named by layers that have some: dorado's files are, whatever else config.toml lists."""
    return find_weights(folder)[0].suffix == ".tensor"


def _only_tensor(file: Path) -> npt.NDArray[Any]:
    loaded = _load(file)
    tensors = [loaded] if isinstance(loaded, np.ndarray) else _tensors(loaded)
    if len(tensors) != 1:
        raise SettingsError(f"{file} holds {len(tensors)} tensors; dorado's files hold one each")
    return tensors[0]


def _tensors(loaded: Any) -> list[npt.NDArray[Any]]:
    state = loaded.state if isinstance(loaded, _Module) else loaded
    return [value for value in state.values() if isinstance(value, np.ndarray)] if isinstance(state, dict) else []


def _load(file: Path) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if pickled is None:
                raise SettingsError(f"{file} is no file of PyTorch's: it has no data.pkl")
            with archive.open(pickled) as stream:
                return _Tensors(stream, archive, pickled.removesuffix("data.pkl")).load()
    except SettingsError:
        raise
    except pickle.UnpicklingError as error:
        raise SettingsError(f"{file}: {error}") from error
    except Exception as error:  # a damaged pickle may raise any
        raise SettingsError(f"{file} can't be read as weights of PyTorch's: {error!r}") from error


class _Module:
    """A scripted module, of which only the attributes are wanted."""

    def __init__(self, *given: object) -> None:
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Tensors(pickle.Unpickler):
    """Unpickles tensors and plain containers, and nothing else."""

    def __init__(self, stream: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(stream)
        self._archive = archive
        self._root = root

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if module == "torch" and name in _TYPES:
            return name
        if module.startswith("__torch__"):
            return _Module
        if (module, name) in known:
            return known[module, name]
        raise pickle.UnpicklingError(f"names {module}.{name}, which weights have no use for; it is not loaded")

    def persistent_load(self, identity: Any) -> npt.NDArray[Any]:
        _, kind, key, _, count = identity
        name = kind if isinstance(kind, str) else "FloatStorage"
        return np.frombuffer(self._archive.read(f"{self._root}data/{key}"), _TYPES[name])[: int(count)]


def _rebuilt(
    storage: npt.NDArray[Any], offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: object
) -> npt.NDArray[Any]:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    inside = min(size, default=1) >= 1 and min(stride, default=0) >= 0 <= offset and last < len(storage)
    if not inside or math.prod(size) > len(storage):  # more, by a step of 0, would ask for any memory
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} does not lie in its {len(storage)} numbers")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()
