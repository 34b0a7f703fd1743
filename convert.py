"""Official LAQ checkpoint -> a checkpoint that every stage here reads.

    python convert.py laq_openx.pt runs/official-laq
    python convert.py laq.safetensors runs/official-laq --image_size 256

The file is read with `weights_only`, its tensors are loaded strictly, and the quirks its numbers
depend on are switched on in the configuration that is written.
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

import common
from model import LAQ, LAQConfig, load_strictly

# Official LAQ key -> ours, in order.
LAQ_KEYS = (
    (r"^module\.", ""),
    (r"^spatial_rel_pos_bias\.net\.2\.", "position_bias.net.4."),
    (r"^spatial_rel_pos_bias\.net\.1\.0\.", "position_bias.net.2."),
    (r"^spatial_rel_pos_bias\.net\.0\.0\.", "position_bias.net.0."),
    (r"^to_patch_emb_first_frame\.1\.", "patch_embed.0."),
    (r"^to_patch_emb_first_frame\.2\.", "patch_embed.1."),
    (r"^to_patch_emb_first_frame\.3\.", "patch_embed.2."),
    (r"^to_pixels_first_frame\.0\.", "to_pixels."),
    (r"^enc_(spatial|temporal)_transformer\.", r"\1_encoder."),
    (r"^dec_spatial_transformer\.", "decoder."),
    (r"\.layers\.(\d+)\.0\.dsconv\.", r".layers.\1.peg.conv."),
    (r"\.layers\.(\d+)\.1\.", r".layers.\1.attention."),
    (r"\.layers\.(\d+)\.2\.", r".layers.\1.cross."),
    (r"\.layers\.(\d+)\.3\.4\.", r".layers.\1.ff.3."),
    (r"\.layers\.(\d+)\.3\.", r".layers.\1.ff."),
    (r"\.gamma$", ".weight"),
    (r"^vq\.cnn_encoder\.", "quantizer.cnn."),
    (r"^vq\.codebooks$", "quantizer.codebook"),
    (r"^vq\.", "quantizer."),
)


def laq_from_official(state, image_size=None):
    """Official LAQ state_dict (with or without the `module.` prefix) -> LAQ, strictly loaded.

    The configuration is read off the tensors' shapes; the two quirks that the weights depend on are
    switched on.  image_size defaults to the 8 patches a side that codes of length 1, 2 and 4 need;
    longer codes need it given.  Raises ValueError naming wrong tensors, or an odd shape."""
    weights = {}
    for name, tensor in state.items():
        if name.endswith(".beta"):
            if tensor.any():
                raise ValueError(f"{name}: expected zeros (a LayerNorm without bias)")
        elif tensor.numel():  # self-attention carries null_kv of size zero
            for pattern, ours in LAQ_KEYS:
                name = re.sub(pattern, ours, name)
            weights[name] = tensor.float()

    def shape(name, rank):
        if name not in weights or weights[name].ndim != rank:
            raise ValueError(f"tensor {name} of rank {rank} is missing: not a LAQ checkpoint")
        return weights[name].shape

    def depth(part):
        return 1 + max((int(k.split(".")[2]) for k in weights if k.startswith(part + ".layers.")),
                       default=-1)

    dim, pixels = shape("patch_embed.1.weight", 2)
    codes, quant_dim = shape("quantizer.codebook", 2)
    patch = math.isqrt(pixels // 3)
    second = weights.get("quantizer.cnn.2.weight")
    lengths = {(4, 4): 1, (3, 4): 2, (3, 3): 4}  # kernel of the second convolution -> code_len
    if second is None:
        if not image_size:
            raise ValueError("pass --image_size: the tensors of so long a code do not tell it")
        code_len = math.ceil(image_size / patch / 2) ** 2
    elif (image_size := image_size or 8 * patch) // patch > 8:  # two stride-2 convolutions
        code_len = math.ceil(image_size / patch / 4) ** 2
    else:
        code_len = lengths.get(tuple(second.shape[2:]), 0)
    config = LAQConfig(
        image_size=image_size, patch_size=patch, dim=dim,
        spatial_depth=depth("spatial_encoder"), temporal_depth=depth("temporal_encoder"),
        decoder_depth=depth("decoder"),
        heads=shape("position_bias.net.4.weight", 2)[0],
        dim_head=shape("spatial_encoder.layers.0.attention.q_scale", 1)[0], quant_dim=quant_dim,
        codebook_size=codes, code_len=code_len, official_peg=True, official_code_read=True)
    model = LAQ(config)
    load_strictly(model, {**weights, "quantizer.uses": model.quantizer.uses})
    return model


@dataclass
class ConvertConfig:
    source: str  # official LAQ file, .pt or .safetensors
    out: str  # folder to write
    image_size: int = 0  # pixels; 0: eight patches a side, as the official models have
    window: float = 0.6  # seconds between the frames it was trained on (not stored in the file)


def convert(c):
    source = Path(c.source)
    if not source.is_file():
        common.fail(f"{source}: no such file")
    if Path(c.out).exists():
        common.fail(f"{c.out} exists: remove it or choose another folder")
    try:
        state = load_file(source) if source.suffix == ".safetensors" else \
            torch.load(source, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
            raise ValueError("expected a flat dictionary of tensors")
        model = laq_from_official(state, c.image_size or None)
    except ValueError as error:
        common.fail(f"{source}: {error}")
    except Exception as error:  # whatever else a broken or foreign file provokes in the loaders
        common.fail(f"{source}: cannot be read as tensors ({type(error).__name__})")
    meta = {"stage": "quantize", "model": model.config.__dict__, "window": c.window,
            "source": source.name}
    path = common.save_checkpoint(c.out, 0, model.state_dict(), meta)
    print(f"wrote {path}: code_len {model.config.code_len}, image_size {model.config.image_size}")


if __name__ == "__main__":
    convert(common.parse_options(ConvertConfig, sys.argv[1:], positional=("source", "out"),
                                 usage="convert.py SOURCE OUT [options]")[0])
