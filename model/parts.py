"""What both networks need: fields of their configs, patches, weights in and out."""

from collections.abc import Collection, Mapping
from dataclasses import field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

Value = TypeVar("Value")


def option(default: Value, help: str, least: int | None = None) -> Value:
    """A dataclass field with its help; least: the smallest whole number that is allowed"""
    return field(default=default, metadata={"help": help, "least": least})


def patchify(frames: Tensor, patch_size: int) -> Tensor:
    """[.., C, H, W] -> patches [.., N, C p p], each in the order channel, row, column"""
    pixels = F.pixel_unshuffle(frames, patch_size)  # .. Cpp h w
    return pixels.flatten(-2).mT.contiguous()  # .. N Cpp


# ------------------------------------------------------------------------ weights, sharded or not
def differences(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> str:
    """Two tables name -> shape: every missing, unexpected and misshapen tensor in words, or "" """
    misshapen = [
        f"{name} {tuple(found[name])}, expected {tuple(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "wrong shape": misshapen,
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, sharded or not; every process takes part"""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy full values into a parameter, or this process's part of them into a sharded one"""
    if isinstance(parameter, DTensor):
        values = distribute_tensor(
            values.to(parameter.device).contiguous(),
            parameter.device_mesh,
            parameter.placements,
            src_data_rank=None,
        )
    parameter.detach().copy_(values)


def load_strictly(
    model: nn.Module, weights: Mapping[str, Tensor], fresh: Collection[str] = ()
) -> None:
    """Copy `weights` (name -> tensor or safetensors slice, read one by one) into model; names and
    shapes must agree as sets, but those in `fresh` keep their initial values.  Raises ValueError
    that names all `differences`."""

    def shape(tensor: Tensor) -> tuple[int, ...]:
        return tuple(tensor.shape if torch.is_tensor(tensor) else tensor.get_shape())

    ours = {name: tensor for name, tensor in model.state_dict().items() if name not in fresh}
    if problems := differences(
        {name: shape(tensor) for name, tensor in ours.items()},
        {name: shape(tensor) for name, tensor in weights.items()},
    ):
        raise ValueError(problems)
    for name, tensor in ours.items():
        fill(tensor, weights[name][:])
