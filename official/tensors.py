"""Official files of weights, whatever their form: names, sizes, and tensors read one at a time."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import common
from model import differences

Shape = tuple[int, ...]
Names = tuple[tuple[str, str], ...]  # (pattern in our name, what replaces it), applied in order
Readers = list[tuple[str, Callable[[], Tensor]]]  # (our name, function that reads the tensor)


@dataclass
class Stored:
    """A tensor of an official file that has not been read yet"""

    shape: Shape
    read: Callable[..., Tensor]  # read() -> the tensor; read(layer) -> one of its scanned layers


Source = dict[str, Stored]  # official name -> tensor


def as_stored(tensor: Tensor) -> Tensor:
    return tensor


def in_memory(tensors: dict[str, Tensor]) -> Source:
    """Tensors that a file gives all at once"""
    return {
        name: Stored(tuple(tensor.shape), partial(as_stored, tensor))
        for name, tensor in tensors.items()
    }


@dataclass
class Counterpart:
    """The official tensor that holds one of ours"""

    name: str
    shape: Shape
    arrange: Callable[[Tensor], Tensor] = as_stored  # official arrangement -> ours
    layer: int | None = None  # which of its scanned layers is ours


def rename(name: str, names: Names) -> str:
    """Our name of a tensor -> the official one"""
    for pattern, official in names:
        name = re.sub(pattern, official, name)
    return name


def count_numbers(source: Source, pattern: str) -> int:
    """How many different numbers the group of `pattern` takes at the start of the names"""
    found = (re.match(pattern, name) for name in source)
    return len({match[1] for match in found if match})


def axis_size(source: Source, name: str, axis: int) -> int | None:
    """The length of a tensor's axis, or None where there is no such tensor or axis"""
    shape = source[name].shape if name in source else ()
    return shape[axis] if -len(shape) <= axis < len(shape) else None


def read_size(source: Source, *places: tuple[str, int]) -> int:
    """Read one size of a network from the axes of a few named tensors.

    places: (tensor name, axis), at most three: where the size is defined, where it has to be the
    same, and what decides when these two differ.  The size is the one that two of them agree on, so
    that with one damaged tensor `match` still compares all others and names that one.  Raises
    ValueError that names the tensors if all are missing, or if no two of them agree."""
    names = [name for name, _ in places]
    sizes = [size for place in places if (size := axis_size(source, *place)) is not None]
    if not sizes:
        wrong = [f"{name} {source[name].shape}" for name in names if name in source]
        raise ValueError(
            f"wrong shape: {' and '.join(wrong)}" if wrong else f"missing: {' and '.join(names)}"
        )
    for size in sizes:
        if len(sizes) == 1 or sizes.count(size) > 1:
            return size
    found = " or ".join(map(str, sizes))
    raise ValueError(f"wrong shape: {' and '.join(names)} disagree: {found}")


def match(
    kind: Callable[..., nn.Module],
    config: object,
    source: Source,
    counterpart: Callable[[str, Shape], Counterpart],
) -> Readers:
    """Strictly pair the tensors of the model kind(config) with those of an official file.

    counterpart: (our name, our shape) -> the official tensor.  Raises ValueError with the official
    names of all tensors that are missing, unexpected or misshapen.
    """
    with torch.device("meta"):
        tensors = kind(config).state_dict()
    table = {name: counterpart(name, tuple(tensor.shape)) for name, tensor in tensors.items()}
    expected = {official.name: official.shape for official in table.values()}
    found = {name: stored.shape for name, stored in source.items()}
    if problems := differences(expected, found):
        raise ValueError(problems)
    return [
        (name, partial(read_ours, source[official.name], official))
        for name, official in table.items()
    ]


def read_ours(stored: Stored, official: Counterpart) -> Tensor:
    """Read one official tensor, or one of its layers, in our arrangement"""
    if official.layer is None:
        return official.arrange(stored.read())
    return official.arrange(stored.read(official.layer))


def open_safetensors(path: Path) -> Source:
    """The tensors of a safetensors file, or of all those in a folder"""
    source = {}
    for file in common.weight_files(path) if path.is_dir() else [path]:
        with common.refuse(f"{file}", (OSError, SafetensorError)):
            opened = safe_open(file, "pt")
        names = opened.keys()
        for name in names:
            shape = tuple(opened.get_slice(name).get_shape())
            source[name] = Stored(shape, partial(read_safetensor, file, name))
    return source


def read_safetensor(file: Path, name: str) -> Tensor:
    return safe_open(file, "pt").get_tensor(name)
