"""LWM's image tokenizer, a VQGAN (frozen): the full-size VLA reads an image as its codes.

Letters in shape comments as in model.py: B batch, C channels, H W pixels, N codes of an image."""

import hashlib
import json
import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from common import latest, refuse
from model import END_OF_IMAGE, load_strictly, nearest


@dataclass
class VQGANConfig:
    """Shape of an image tokenizer; the defaults are LWM's (146,244,675 parameters)."""

    image_size: int = 256  # pixels, square: 256 codes
    hidden: int = 128  # channels at full resolution
    multipliers: tuple = (1, 2, 2, 4, 6)  # of `hidden`, a level; the resolution halves in between
    blocks: int = 2  # residual blocks a level (the decoder has one more)
    z_channels: int = 64
    quant_dim: int = 64
    codebook_size: int = 8192


conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)
norm = partial(nn.GroupNorm, 32, eps=1e-6)


class Residual(nn.Module):
    """[B, C, H, W] -> [B, out, H, W]"""

    def __init__(self, channels, out):
        super().__init__()
        self.norm0, self.conv0 = norm(channels), conv3x3(channels, out)
        self.norm1, self.conv1 = norm(out), conv3x3(out, out)
        self.conv2 = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x):
        y = self.conv0(F.silu(self.norm0(x)))
        return self.conv2(x) + self.conv1(F.silu(self.norm1(y)))


def coder(channels, first, widths, blocks, out, up):
    """Encoder or decoder (`up`): a convolution to `first`, for each of `widths` a level of residual
    blocks, half or twice the resolution in between, two blocks where it is lowest, a convolution"""

    def level(i):
        w = widths[i]
        resample = (
            [nn.Upsample(scale_factor=2), conv3x3(w, w)]
            if up
            else [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(w, w, 3, stride=2)]
        )  # below and right (code)
        return nn.Sequential(
            *(Residual(w if b else widths[i - 1] if i else first, w) for b in range(blocks)),
            *resample * (i + 1 < len(widths)),
        )

    low = widths[0 if up else -1]
    levels = "levels", nn.Sequential(*map(level, range(len(widths))))
    middle = "middle", nn.Sequential(Residual(low, low), Residual(low, low))
    return nn.Sequential(
        OrderedDict(
            [
                ("conv0", conv3x3(channels, first)),
                *((middle, levels) if up else (levels, middle)),
                ("norm0", norm(widths[-1])),
                ("silu", nn.SiLU()),
                ("conv1", conv3x3(widths[-1], out)),
            ]
        )
    )


class VQGAN(nn.Module):
    """images float [B, 3, H, W] in [-1, 1] <-> codes int64 [B, N], row by row"""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        widths = [c.hidden * m for m in c.multipliers]
        self.encoder = coder(3, c.hidden, widths, c.blocks, c.z_channels, up=False)
        self.to_code = nn.Conv2d(c.z_channels, c.quant_dim, 1)
        self.codebook = nn.Parameter(torch.randn(c.codebook_size, c.quant_dim))
        self.from_code = nn.Conv2d(c.quant_dim, c.z_channels, 1)
        self.decoder = coder(c.z_channels, widths[-1], widths[::-1], c.blocks + 1, 3, up=True)

    @torch.no_grad()
    def encode(self, images):
        z = self.to_code(self.encoder(images))
        return nearest(z.flatten(2).transpose(1, 2), self.codebook)

    @torch.no_grad()
    def decode(self, codes):
        grid = math.isqrt(codes.shape[1])
        z = self.codebook[codes].transpose(1, 2).unflatten(2, (grid, grid))
        return self.decoder(self.from_code(z)).clamp(-1, 1)


def load_vqgan(path, option, device, shape):
    """The image tokenizer beside a VLA of that shape (its config) -> VQGAN, frozen, with its `file`
    on disk"""
    folder, patch = latest(path), shape["patch_size"]
    with refuse(
        f"--{option} {folder}: expected a VQGAN, as convert.py puts it beside a model",
        (KeyError, TypeError, OSError, ValueError, SafetensorError),
    ):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        vqgan = VQGAN(VQGANConfig(**config["vqgan"]))
        vqgan.file = folder / "vqgan.safetensors"
        vqgan.mark = hashlib.sha256(vqgan.file.read_bytes()).hexdigest()[:12]
        load_strictly(vqgan, load_file(vqgan.file))
        found = 2 ** (len(vqgan.config.multipliers) - 1), vqgan.config.codebook_size
        if found[0] != patch or not found[1] <= END_OF_IMAGE < shape["vision_vocab"]:
            raise ValueError(
                f"{found[1]} codes for {found[0]} pixels each do not fit a model of "
                f"{shape['vision_vocab']} for {patch}"
            )
    return vqgan.to(device).eval()
