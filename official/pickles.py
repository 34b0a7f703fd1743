"""Pickles of arrays, read without running what else they may hold."""

import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def rebuild_jax_array(
    make: Callable[..., np.ndarray], arguments: tuple, state: tuple, _weak_type: object = None
) -> np.ndarray:
    """The numpy array inside a pickled jax array (jax/_src/array.py, _reconstruct_array)"""
    array = make(*arguments)
    array.__setstate__(state)
    return array


def encode_text(text: str, encoding: str) -> bytes:
    """How pickles of protocols 0 to 2 hold bytes"""
    return text.encode(encoding)


class ArraysOnly(pickle.Unpickler):
    """Builds dictionaries of numpy arrays; raises UnpicklingError that names anything else"""

    ALLOWED = {
        "builtins.dict": dict,
        "collections.OrderedDict": dict,
        "flax.core.frozen_dict.FrozenDict": dict,
        "jax._src.array._reconstruct_array": rebuild_jax_array,
        "jax._src.device_array.reconstruct_device_array": rebuild_jax_array,
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "numpy._core.multiarray._reconstruct": np._core.multiarray._reconstruct,
        "numpy._core.numeric._frombuffer": np._core.numeric._frombuffer,
        "_codecs.encode": encode_text,
    }

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        full = f"{module}.{name}".replace("numpy.core.", "numpy._core.")  # numpy 1 -> 2
        if full not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it wants to run {full}, which is not allowed")
        return self.ALLOWED[full]


def flatten(tree: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """A nested dictionary of float arrays -> ("encoder/Conv_0/kernel", float32 tensor), ..

    Raises ValueError that names what is neither."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flatten(value, f"{path}/{key}")
    elif isinstance(tree, np.ndarray) and tree.dtype.kind == "f":
        name = re.sub("^/(params/)?", "", path)
        yield name, torch.from_numpy(np.asarray(tree, np.float32))
    else:
        where = path[1:] or "the file"
        raise ValueError(f"{where}: {type(tree).__name__}, expected an array of floats")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A pickled nested dictionary of float arrays -> tensors by the path to them"""
    try:
        with open(path, "rb") as file:
            return dict(flatten(ArraysOnly(file).load()))
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(f"not a whole pickle of arrays: {error}") from None
