"""The two networks of LAPA: the latent action quantizer (LAQ) and the vision-language-action model.

LAQ  (paper 3.1, figure 8)  a VQ-VAE in the style of C-ViViT: two frames in, `code_len` codes out,
     and a decoder that draws the second frame from the first one and the codes.  `quantize.py`
     trains it.
VLA  (paper 3.2, 3.3)  a LLaMA body over four vocabularies (text, vision, latent action, robot
     action); every position belongs to one of them.  `pretrain.py` and `finetune.py` train it.

This folder needs only torch and can be copied out.  "(code)" marks what the paper leaves open and
the official repository (github.com/LatentActionPretraining/LAPA) decides.  "Gain" is the speed of a
fast path relative to its plain form, in training (forward and backward) and in inference,
for the shapes of the presets tiny and lapa; `python -m benchmarks.fast_paths` measures it.

Letters in shape comments: B batch, T time (2 in a pair), C color, H W pixels, N patches of a frame,
D width, K code_len, Q quant_dim, L sequence length, S slots of a cache, V a vocabulary's size."""

from .laq import LAQ, LAQConfig, nearest
from .parts import differences, full_tensor, load_strictly
from .vla import (
    ACTION,
    END_OF_IMAGE,
    LATENT,
    LOW_RANK,
    TEXT,
    VISION,
    VLA,
    VLAConfig,
    build_vla,
)

__all__ = [
    "ACTION",
    "END_OF_IMAGE",
    "LAQ",
    "LAQConfig",
    "LATENT",
    "LOW_RANK",
    "TEXT",
    "VISION",
    "VLA",
    "VLAConfig",
    "build_vla",
    "differences",
    "full_tensor",
    "load_strictly",
    "nearest",
]
