"""LAPA's latent action quantizers, `laq_*.pt` (docs/formats.md)."""

import math
import re
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from model import LAQ, LAQConfig, differences
from official.tensors import (
    Counterpart,
    Readers,
    Shape,
    Source,
    Stored,
    count_numbers,
    match,
    read_size,
    rename,
)

LAQ_NAMES = (  # ours -> official
    (r"^position_bias\.net\.0\.", "spatial_rel_pos_bias.net.0.0."),
    (r"^position_bias\.net\.2\.", "spatial_rel_pos_bias.net.1.0."),
    (r"^position_bias\.net\.4\.", "spatial_rel_pos_bias.net.2."),
    (r"^patch_embed\.2\.", "to_patch_emb_first_frame.3."),
    (r"^patch_embed\.1\.", "to_patch_emb_first_frame.2."),
    (r"^patch_embed\.0\.", "to_patch_emb_first_frame.1."),
    (r"^to_pixels\.", "to_pixels_first_frame.0."),
    (r"^(spatial|temporal)_encoder\.", r"enc_\1_transformer."),
    (r"^decoder\.", "dec_spatial_transformer."),
    (r"\.(norm|context_norm|norm_out)\.weight$", r".\1.gamma"),
    (r"\.peg\.conv\.", ".0.dsconv."),
    (r"\.attention\.", ".1."),
    (r"\.cross\.", ".2."),
    (r"\.ff\.3\.", ".3.4."),
    (r"\.ff\.", ".3."),
    (r"^quantizer\.codebook$", "vq.codebooks"),
    (r"^quantizer\.cnn\.", "vq.cnn_encoder."),
    (r"^quantizer\.", "vq."),
)

# The kernel of the second convolution of the CNN that makes the codes (none: there is only one) ->
# numbers of codes that it may make, each with the patches per side that the paper's shape has.
SECOND_CONVOLUTION = "vq.cnn_encoder.2.weight"
GRIDS = {
    (4, 4): {1: 8},
    (3, 4): {2: 8},
    (3, 3): {4: 8, 16: 16},
    (): {64: 16, 256: 32},
}


def laq_counterpart(name: str, shape: Shape) -> Counterpart:
    """Our LAQ's tensor in an official file"""
    return Counterpart(rename(name, LAQ_NAMES), shape)


def codes_of_grid(kernel: Shape, grid: int) -> int:
    """How many codes a CNN with this second kernel makes of grid x grid patches"""
    if kernel == (3, 3):
        return math.ceil(grid / 4) ** 2
    if kernel == ():
        return math.ceil(grid / 2) ** 2
    return next(iter(GRIDS[kernel]))


def code_layout(
    source: Source, patch_size: int, code_len: int = 0, image_size: int = 0
) -> tuple[int, int]:
    """How many codes a LAQ makes, and of how many patches per side.

    A kernel that fits one number of codes gives both.  A 3x3 one makes 4 codes of 8 patches per
    side or 16 of 16, and where there is no second convolution the patches alone decide: then
    code_len or image_size (0: not given) has to say.  Raises ValueError if that is missing or does
    not fit.
    """
    kernel = source[SECOND_CONVOLUTION].shape[2:] if SECOND_CONVOLUTION in source else ()
    if kernel not in GRIDS:
        raise ValueError(f"wrong shape: {SECOND_CONVOLUTION} has kernel {kernel}")
    grids = GRIDS[kernel]
    if image_size:
        grid = image_size // patch_size
        made = codes_of_grid(kernel, grid)
        if code_len and code_len != made:
            raise ValueError(
                f"its tensors make {made} codes of {image_size} pixels, not --code_len {code_len}"
            )
        return made, grid
    if not code_len and len(grids) > 1:
        choices = [f"{codes} codes of {grid * patch_size} pixels" for codes, grid in grids.items()]
        raise ValueError(f"its tensors fit {' or '.join(choices)}: pass --code_len or --image_size")
    code_len = code_len or next(iter(grids))
    if code_len not in grids:
        raise ValueError(
            f"its tensors do not make --code_len {code_len}, but "
            f"{' or '.join(map(str, grids))} (else pass --image_size)"
        )
    return code_len, grids[code_len]


def read_sizes(source: Source) -> dict[str, int]:
    """The fields of a LAQConfig that its tensor shapes give"""
    pixels = read_size(  # values of a patch
        source,
        ("to_patch_emb_first_frame.2.weight", 1),
        ("to_patch_emb_first_frame.1.weight", 0),
        ("to_pixels_first_frame.0.weight", 0),
    )
    first_layer = "enc_spatial_transformer.layers.0.1."
    cross_attention = "dec_spatial_transformer.layers.0.2."
    return {
        "patch_size": math.isqrt(pixels // 3),
        "dim": read_size(
            source,
            ("to_patch_emb_first_frame.2.weight", 0),
            ("vq.project_in.weight", 1),
            ("vq.project_out.weight", 0),
        ),
        "heads": read_size(
            source,
            ("spatial_rel_pos_bias.net.2.weight", 0),
            ("spatial_rel_pos_bias.net.2.bias", 0),
            (f"{cross_attention}null_kv", 0),
        ),
        "dim_head": read_size(
            source,
            (f"{first_layer}q_scale", 0),
            (f"{first_layer}k_scale", 0),
            (f"{cross_attention}null_kv", 2),
        ),
        "spatial_depth": count_numbers(source, r"enc_spatial_transformer\.layers\.(\d+)\."),
        "temporal_depth": count_numbers(source, r"enc_temporal_transformer\.layers\.(\d+)\."),
        "decoder_depth": count_numbers(source, r"dec_spatial_transformer\.layers\.(\d+)\."),
        "quant_dim": read_size(
            source,
            ("vq.codebooks", 1),
            ("vq.project_in.weight", 0),
            ("vq.project_out.weight", 1),
        ),
        "codebook_size": read_size(source, ("vq.codebooks", 0)),
    }


def from_laq(path: Path, code_len: int = 0, image_size: int = 0) -> tuple[LAQConfig, Readers]:
    """An official LAQ file, with or without the `module.` prefix -> its shape, and its tensors.

    code_len, image_size: see code_layout.  Raises ValueError that names the tensors which are
    missing, unexpected or misshapen."""
    state = {name.removeprefix("module."): tensor for name, tensor in read_torch(path).items()}
    source = {
        name: Stored(tuple(tensor.shape), tensor.float)
        for name, tensor in state.items()
        if not name.endswith(".beta") and not is_empty_null(name, tensor)
    }
    sizes = read_sizes(source)
    code_len, grid = code_layout(source, sizes["patch_size"], code_len, image_size)
    config = LAQConfig(
        image_size=image_size or grid * sizes["patch_size"],
        code_len=code_len,
        official_peg=True,
        official_code_read=True,
        **sizes,
    )
    size = sizes["codebook_size"]
    source["vq.uses"] = Stored((size,), partial(torch.zeros, size))  # ours: no use counted yet
    tensors = match(LAQ, config, source, laq_counterpart)
    check_betas(state)
    return config, tensors


def is_empty_null(name: str, tensor: Tensor) -> bool:
    """Whether this is a `null_kv` of self-attention, which has none: [heads, 0, dim_head]"""
    return name.endswith(".null_kv") and tensor.numel() == 0


def check_betas(state: dict[str, Tensor]) -> None:
    """Raises ValueError unless there is a buffer `beta` of zeros for each `gamma`, and no other"""
    betas = {name: tensor for name, tensor in state.items() if name.endswith(".beta")}
    expected = {
        name.removesuffix("gamma") + "beta": tensor.shape
        for name, tensor in state.items()
        if name.endswith("gamma")
    }
    found = {name: tensor.shape for name, tensor in betas.items()}
    nonzero = [name for name, tensor in betas.items() if tensor.any()]
    if problems := differences(expected, found) or ", ".join(nonzero):
        raise ValueError(f"{problems}: expected zeros for each gamma")


def read_torch(path: Path) -> dict[str, Tensor]:
    """A flat dictionary of tensors from torch.save or safetensors.  Raises ValueError for others"""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle can raise anything
        named = re.search(r"GLOBAL (\S+)", str(error))
        said = f"it wants {named[1]}, which is not allowed" if named else "not a file of tensors"
        raise ValueError(said) from None
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise ValueError("expected a flat dictionary of tensors")
    return state
