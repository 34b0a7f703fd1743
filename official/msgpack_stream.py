"""The official `params` files: a stream of msgpack values, one per tensor (docs/formats.md).

Written by tux's StreamingCheckpointer (github.com/lhao499/tux), whose arrays are packed by
flax.serialization.  Our own reader knows the msgpack forms that occur there
(github.com/msgpack/msgpack/blob/master/spec.md) and walks over 13.6 GB without holding a tensor."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The first byte of a value tells its form.  Short forms hold a number in this byte itself:
FIXINT = range(0x00, 0x80)  # the integer
FIXMAP = range(0x80, 0x90)  # number of entries
FIXARRAY = range(0x90, 0xA0)  # number of items
FIXSTR = range(0xA0, 0xC0)  # number of bytes
FIXEXT = range(0xD4, 0xD9)  # logarithm of the number of bytes: 1, 2, 4, 8 or 16
FALSE = 0xC2
TRUE = 0xC3
# Long forms: first byte -> width in bytes of the big-endian number that follows.
BIN = {0xC4: 1, 0xC5: 2, 0xC6: 4}
EXT = {0xC7: 1, 0xC8: 2, 0xC9: 4}
UINT = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
STR = {0xD9: 1, 0xDA: 2, 0xDB: 4}
ARRAY = {0xDC: 2, 0xDD: 4}
MAP = {0xDE: 2, 0xDF: 4}

KEY_AND_BLOB = bytes([FIXARRAY.start + 2])  # how each tensor of the stream begins
NOT_WEIGHTS = ("step", "opt_state")  # parts of a whole training state

Value = int | str | range | list | dict  # range: the bytes that a bin or ext form carries


@dataclass
class StreamTensor:
    """Where a params file keeps a tensor"""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[range]  # byte ranges of the file, one after another; C order, little endian


def read_bytes(file: BinaryIO, count: int) -> bytes:
    """Exactly `count` bytes.  Raises EOFError where the file has fewer left"""
    block = file.read(count)
    if len(block) < count:
        raise EOFError
    return block


def read_number(file: BinaryIO, width: int) -> int:
    return int.from_bytes(read_bytes(file, width), "big")


def pass_over(file: BinaryIO, count: int) -> range:
    """Where the next `count` bytes are, without reading them.  Raises EOFError if missing"""
    begin = file.tell()
    file.seek(begin + count - 1)
    read_bytes(file, 1)
    return range(begin, begin + count)


def read_value(file: BinaryIO) -> Value:
    """The msgpack value at a file's position.

    Numbers, booleans, strings, lists and dictionaries as such; of bin and ext forms only the byte
    range of what they carry.  Raises ValueError for a form that no params file has, EOFError.
    """
    form = read_bytes(file, 1)[0]
    if form in FIXINT:
        return form
    if form in UINT:
        return read_number(file, UINT[form])
    if form in (FALSE, TRUE):
        return form == TRUE
    if form in BIN:
        return pass_over(file, read_number(file, BIN[form]))
    if form in FIXEXT or form in EXT:
        size = 1 << FIXEXT.index(form) if form in FIXEXT else read_number(file, EXT[form])
        read_bytes(file, 1)  # its type: 1 array, 3 numpy scalar, which carry the same
        return pass_over(file, size)
    if form in FIXSTR or form in STR:
        size = FIXSTR.index(form) if form in FIXSTR else read_number(file, STR[form])
        return read_bytes(file, size).decode()
    if form in FIXARRAY or form in ARRAY:
        size = FIXARRAY.index(form) if form in FIXARRAY else read_number(file, ARRAY[form])
        return [read_value(file) for _ in range(size)]
    if form in FIXMAP or form in MAP:
        size = FIXMAP.index(form) if form in FIXMAP else read_number(file, MAP[form])
        return {read_value(file): read_value(file) for _ in range(size)}
    raise ValueError(f"format byte {form:#x}")


def read_value_at(file: BinaryIO, where: range) -> Value:
    """The msgpack value that a bin or ext form carries"""
    file.seek(where.start)
    return read_value(file)


def in_order(table: dict[str, Value]) -> list[Value]:
    """{"1": b, "0": a} -> [a, b]"""
    return [table[str(i)] for i in range(len(table))]


def read_array(file: BinaryIO, blob: range) -> StreamTensor:
    """Read what a blob says of its array: an ext form with [shape, dtype name, bytes], or a map of
    `shape` and of such `chunks`, which are flat.  Raises ValueError, KeyError, .. for others."""
    value = read_value_at(file, blob)
    chunks = in_order(value["chunks"]) if isinstance(value, dict) else [value]
    arrays = [read_value_at(file, chunk) for chunk in chunks]
    shape = in_order(value["shape"]) if isinstance(value, dict) else arrays[0][0]
    found = StreamTensor(tuple(shape), DTYPES[arrays[0][1]], [array[2] for array in arrays])
    if sum(map(len, found.pieces)) != math.prod(shape) * found.dtype.itemsize:
        raise ValueError("its bytes do not fill its shape")
    return found


def read_stream(path: Path) -> dict[str, StreamTensor]:
    """Walk over a params file -> tensors by their names, such as "transformer/ln_f/kernel".

    Raises ValueError that names the tensor where the file is cut short or holds something else.
    """
    found, repeated = {}, []
    name = "the beginning"
    with open(path, "rb") as file:
        try:
            while first := file.read(1):
                name = f"after {name}"  # until it is known
                if first != KEY_AND_BLOB:
                    raise ValueError("expected an array of two")
                key = read_value(file)
                name = re.sub("^(params/)+", "", "/".join(key))
                blob = read_value(file)
                if key[0] in NOT_WEIGHTS:
                    continue
                if name in found:
                    repeated.append(name)
                found[name] = read_array(file, blob)
                file.seek(blob.stop)
        except EOFError:
            raise ValueError(f"cut short in tensor {name}") from None
        except (ValueError, TypeError, LookupError, AttributeError):  # whatever other bytes make
            raise ValueError(f"tensor {name}: not a params stream") from None
    if repeated:
        raise ValueError(f"{', '.join(repeated)}: more than once")
    if not found:
        raise ValueError("holds no tensor")
    return found


def read_tensor(path: Path, tensor: StreamTensor, layer: int | None = None) -> Tensor:
    """Read one tensor of a params file, or one layer of it, and nothing else"""
    shape = tensor.shape if layer is None else tensor.shape[1:]
    buffer = memoryview(bytearray(math.prod(shape) * tensor.dtype.itemsize))
    before = (layer or 0) * len(buffer)  # bytes of the tensor that come before the wanted ones
    filled = 0
    with open(path, "rb") as file:
        for piece in tensor.pieces:
            wanted = piece[before : before + len(buffer) - filled]
            before = max(0, before - len(piece))
            file.seek(wanted.start)
            filled += file.readinto(buffer[filled : filled + len(wanted)])
    return torch.frombuffer(buffer, dtype=tensor.dtype).reshape(shape)
