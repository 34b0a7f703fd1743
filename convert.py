"""Official LAQ checkpoint -> a checkpoint that every stage here reads.

    python convert.py laq_openx.pt runs/official-laq
    python convert.py laq.safetensors runs/official-laq --image_size 256

The file is read with `weights_only`, its tensors are loaded strictly, and the quirks its numbers
depend on are switched on in the configuration that is written.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import common
from model import laq_from_official


@dataclass
class ConvertConfig:
    image_size: int = 0  # pixels; 0: eight patches a side, as the official models have
    window: float = 0.6  # seconds between the frames it was trained on (not stored in the file)


def main(argv):
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__.strip() + "\n")
        common.parse_options(ConvertConfig, argv, usage="convert.py SOURCE OUT [options]")
    if len(argv) < 2 or argv[0].startswith("--") or argv[1].startswith("--"):
        common.fail("convert.py SOURCE OUT [options]: two paths come first")
    source, out = Path(argv[0]), Path(argv[1])
    c, _ = common.parse_options(ConvertConfig, argv[2:], usage="convert.py SOURCE OUT [options]")
    if not source.is_file():
        common.fail(f"{source}: no such file")
    if out.exists():
        common.fail(f"{out} exists: remove it or choose another folder")
    try:
        state = load_file(source) if source.suffix == ".safetensors" else \
            torch.load(source, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
            raise ValueError("expected a flat dictionary of tensors")
        model = laq_from_official(state, c.image_size or None)
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, SafetensorError) as error:
        common.fail(f"{source}: {str(error).splitlines()[0]}")
    except Exception as error:  # torch.load raises pickle's own errors on anything else
        common.fail(f"{source}: {type(error).__name__}: {str(error).splitlines()[0]}")
    meta = {"stage": "quantize", "model": model.config.__dict__, "window": c.window,
            "source": source.name}
    folder = common.save_checkpoint(out, 0, model.state_dict(), meta)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
