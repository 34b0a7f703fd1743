"""The recordings of the official code (see recordings.md), and our networks with their weights."""

import atexit
import json
import lzma
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model import LAQ, VLA, load_strictly
from official.laq import from_laq
from official.vla import from_stream
from official.vqgan import VQGAN, from_vqgan

ARCHIVE = Path(__file__).with_name("recordings.tar.xz")
FILTER = {
    "id": lzma.FILTER_LZMA2,
    "preset": 9 | lzma.PRESET_EXTREME,
    "dict_size": 64 << 20,  # all of it, so that nothing is stored twice
    "lc": 2,  # these three: floats are four bytes each
    "lp": 2,
    "pb": 2,
}


@cache
def unpacked() -> Path:
    """A temporary folder with all recordings, made once per test run"""
    folder = Path(tempfile.mkdtemp(prefix="recordings-"))
    atexit.register(shutil.rmtree, folder)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def pack(folder: str | Path) -> None:
    """Write the archive from a folder of recordings: from the same files the same bytes"""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    with (
        lzma.open(ARCHIVE, "wb", filters=[FILTER]) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for path in files:
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size = path.stat().st_size
            with open(path, "rb") as file:
                archive.addfile(entry, file)


def recording(name: str) -> Path:
    return unpacked() / name


def arrays(name: str) -> dict[str, Tensor]:
    """What a recorded npz file holds"""
    return {key: torch.from_numpy(array) for key, array in np.load(recording(name)).items()}


def values(name: str) -> Any:
    """What a recorded JSON file holds"""
    return json.loads(recording(name).read_text(encoding="utf-8"))


def with_weights(network: nn.Module, readers: list[tuple[str, Callable[[], Tensor]]]) -> nn.Module:
    load_strictly(network, {name: read() for name, read in readers})
    return network


def load_laq(path: Path) -> LAQ:
    config, readers = from_laq(path, code_len=4)
    return with_weights(LAQ(config), readers)


def load_vqgan(path: Path) -> VQGAN:
    config, readers = from_vqgan(path)
    return with_weights(VQGAN(config), readers)


def load_vla(path: Path, heads: int = 4) -> VLA:
    """With exact rotary tables: what was recorded in float32 was computed with those"""
    config, readers = from_stream(path, heads=heads, rounded_rope=False)
    return with_weights(VLA(config), readers)
