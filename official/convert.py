"""Official files -> checkpoints that every stage here reads, and back to Hugging Face's layout.

    python -m official.convert params vqgan tokenizer.model lwm/  # LWM-Chat-1M or LAPA-7B (JAX)
    python -m official.convert laq_openx.pt laq/ --code_len 4  # a latent action quantizer of LAPA
    python -m official.convert LWM-Text-Chat-1M/ text/  # a text model in Hugging Face's layout
    python -m official.convert lapa/ hf/ --to hf  # the text part of a VLA, the other way

Names and shapes are compared strictly before anything is written; tensors are then copied one by
one, in their own precision, into safetensors files of up to 2 GB beside a config.json, in which the
official quirks that numbers depend on are switched on.  docs/official-weights.md says where the
files are, docs/formats.md what is in them."""

import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

import common
from common import option
from official.laq import from_laq
from official.tensors import Readers, open_safetensors
from official.tokenizer import convert_tokenizer
from official.vla import from_hugging, from_stream, to_hugging
from official.vqgan import from_vqgan
from sequences import OFFICIAL_TEMPLATE


@dataclass
class ConvertConfig:
    source: list = option(help="official files, or a folder of them")
    out: str = option(help="folder to write")
    to: str = option("", "hf: the text part of a VLA, in Hugging Face's layout")
    heads: int = option(0, "of a VLA whose files do not say; 0: width / 128")
    rope_theta: float = option(5e7, "of a VLA whose files do not say")
    rounded_rope: bool = option(True, "params stream: rotary tables as in official bf16 training")
    image_size: int = option(0, "pixels; 0: 256, or for a LAQ what its codes need")
    code_len: int = option(0, "LAQ: codes per pair; 0: from the file, if it says")
    window: float = option(0.6, "LAQ: seconds between its frames (not in the file)")


@dataclass
class Draft:
    """What the sources of a checkpoint hold together"""

    meta: dict[str, Any] = field(
        default_factory=lambda: {"stage": "vqgan", "model": {}, "step": 0}
    )  # its config.json
    models: dict[Path, Readers] = field(default_factory=dict)  # tensors of each source with a model
    files: dict[str, Any] = field(default_factory=dict)  # others: see common.write_checkpoint


SUFFIXES = {".model": "tokenizer", ".json": "tokenizer", ".csv": "edges", ".pt": "laq"}
FIRST_BYTES = {b"P": "laq", b"\x92": "stream"}  # a zip archive, as torch.save writes it; msgpack


def kind_of(path: Path) -> str:
    """What an official file holds: vqgan, stream, hugging, laq, tokenizer or edges"""
    if path.is_dir() or path.suffix == ".safetensors":
        return "laq" if any("vq." in name for name in open_safetensors(path)) else "hugging"
    if path.suffix in SUFFIXES:
        return SUFFIXES[path.suffix]
    with open(path, "rb") as file:
        return FIRST_BYTES.get(file.read(1), "vqgan")


def read_edges(path: Path) -> list[list[float]]:
    """Official csv of bin edges: one row per dimension, columns 0..n, short rows end early.

    Raises ValueError that names a row without rising edges."""
    head, *rows = path.read_text(encoding="utf-8-sig").splitlines()
    skipped = 1 if head.startswith(",") else 0  # a nameless first column numbers the rows
    edges = [[float(cell) for cell in row.split(",")[skipped:] if cell] for row in rows]
    for i, row in enumerate(edges):
        if not row or not all(map(math.isfinite, row)) or row != sorted(set(row)):
            raise ValueError(f"row {i}: expected edges in increasing order")
    return edges


def add_source(draft: Draft, path: Path, c: ConvertConfig) -> None:
    """Open one official file, compare what it holds, and put it into the draft"""
    kind = kind_of(path)
    if kind == "laq":
        config, draft.models[path] = from_laq(path, c.code_len, c.image_size)
        draft.meta |= {"stage": "quantize", "window": c.window, "model": asdict(config)}
    elif kind == "vqgan":
        config, tensors = from_vqgan(path, c.image_size)
        draft.meta["vqgan"] = asdict(config)
        draft.files["vqgan.safetensors"] = [(name, read()) for name, read in tensors]
    elif kind == "tokenizer":
        draft.files["tokenizer.json"] = path if path.suffix == ".json" else convert_tokenizer(path)
    elif kind == "edges":
        draft.meta["bins"] = read_edges(path)
    else:
        if kind == "stream":
            config, tensors = from_stream(path, c.heads, c.rope_theta, c.rounded_rope, c.image_size)
        else:
            config, tensors = from_hugging(path, c.heads, c.rope_theta, c.image_size)
        draft.models[path] = tensors
        draft.meta |= {
            "stage": "finetune" if config.action_vocab else "pretrain",
            "labels": "official",
            "template": OFFICIAL_TEMPLATE,
            "model": asdict(config),
        }
        draft.files |= {file.name: file for file in path.glob("tokenizer.json")}


def check_together(draft: Draft, sources: str) -> None:
    """Refuse sources that do not form a checkpoint; give a VLA the patches of its VQGAN"""
    meta = draft.meta
    if len(draft.models) > 1 or not draft.models and "vqgan" not in meta:
        common.fail(f"{sources}: expected one model among them, found {len(draft.models)}")
    if "vqgan" in meta and "vision_vocab" in meta["model"]:
        meta["model"]["patch_size"] = 2 ** (len(meta["vqgan"]["multipliers"]) - 1)
    if "bins" in meta:
        most = max(map(len, meta["bins"]), default=0) - 1
        if not 0 <= most <= meta["model"].get("action_vocab", 0):
            common.fail(f"{sources}: {most} action bins do not fit the model")


def convert(c: ConvertConfig) -> None:
    """Write the checkpoint that all sources make together, or nothing"""
    if Path(c.out).exists():
        common.fail(f"{c.out} exists: remove it or choose another folder")
    if c.to not in ("", "hf") or c.to and len(c.source) > 1:
        common.fail(f"--to {c.to}: expected hf, and one checkpoint")
    draft = Draft()
    for path in map(Path, c.source):
        with common.refuse(f"{path}", Exception):  # a broken file can raise anything
            if c.to == "hf":
                draft.models[path], draft.meta, draft.files = to_hugging(path)
            else:
                add_source(draft, path, c)
    if not c.to:
        check_together(draft, " ".join(c.source))
    readers = next(iter(draft.models.values()), [])
    with common.refuse(f"{c.out}", Exception), common.atomically(c.out) as folder:
        tensors = ((name, read()) for name, read in tqdm(readers, "tensors", mininterval=1.0))
        common.write_checkpoint(folder, tensors, draft.meta, draft.files)
    print(f"wrote {c.out}/: " + ", ".join(sorted(file.name for file in Path(c.out).iterdir())))


if __name__ == "__main__":
    convert(common.parse_options(ConvertConfig, sys.argv[1:], positional=("source", "out"))[0])
