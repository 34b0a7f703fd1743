"""LWM's image tokenizer, a VQGAN (frozen): the full-size VLA reads an image as its codes.

Follows lwm/vqgan.py of github.com/LargeWorldModel/LWM.  Letters in shape comments as in
model/: B batch, C channels, H W pixels, h w latent pixels, N = h w codes of an image."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import common
from model import END_OF_IMAGE, load_strictly, nearest
from official.pickles import read_pickle
from official.tensors import (
    Counterpart,
    Readers,
    Shape,
    count_numbers,
    in_memory,
    match,
    read_size,
    rename,
)


# ------------------------------------------------------------------------ network
@dataclass
class VQGANConfig:
    """Shape of an image tokenizer; the defaults are LWM's (146,244,675 parameters)."""

    image_size: int = 256  # pixels, square: 256 codes
    hidden: int = 128  # channels at full resolution
    multipliers: tuple[int, ...] = (1, 2, 2, 4, 6)  # of `hidden`, one per level
    blocks: int = 2  # residual blocks per level (the decoder has one more)
    z_channels: int = 64
    quant_dim: int = 64
    codebook_size: int = 8192

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from full resolution down; each halves the side length"""
        return [self.hidden * multiplier for multiplier in self.multipliers]


def conv3x3(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel_size=3, padding=1)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Residual(nn.Module):
    """Two convolutions beside a shortcut: [B, C, H, W] -> [B, out, H, W]"""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm0 = group_norm(channels)
        self.conv0 = conv3x3(channels, out)
        self.norm1 = group_norm(out)
        self.conv1 = conv3x3(out, out)
        self.conv2 = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv0(F.silu(self.norm0(x)))  # B out H W
        y = self.conv1(F.silu(self.norm1(y)))
        return self.conv2(x) + y


def residuals(channels: int, out: int, count: int) -> list[nn.Module]:
    """`count` residual blocks, of which the first changes the number of channels"""
    return [Residual(channels if i == 0 else out, out) for i in range(count)]


def downsample(channels: int) -> list[nn.Module]:
    """[B, C, H, W] -> [B, C, H/2, W/2]; padded below and to the right alone, as officially"""
    return [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)]


def upsample(channels: int) -> list[nn.Module]:
    """[B, C, H, W] -> [B, C, 2H, 2W]"""
    return [nn.Upsample(scale_factor=2), conv3x3(channels, channels)]


class Encoder(nn.Module):
    """Images [B, 3, H, W] -> [B, z_channels, h, w]"""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        channels = config.hidden
        self.conv0 = conv3x3(3, channels)
        self.levels = nn.Sequential()
        for i, width in enumerate(config.widths):
            blocks = residuals(channels, width, config.blocks)
            lowest = i + 1 == len(config.widths)
            self.levels.append(nn.Sequential(*blocks, *([] if lowest else downsample(width))))
            channels = width
        self.middle = nn.Sequential(*residuals(channels, channels, 2))
        self.norm0 = group_norm(channels)
        self.conv1 = conv3x3(channels, config.z_channels)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv0(images)  # B hidden H W
        x = self.levels(x)  # B C h w
        x = self.middle(x)  # B C h w
        return self.conv1(F.silu(self.norm0(x)))  # B z_channels h w


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> images [B, 3, H, W]; levels.0 has the lowest resolution"""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        channels = widths[0]
        self.conv0 = conv3x3(config.z_channels, channels)
        self.middle = nn.Sequential(*residuals(channels, channels, 2))
        self.levels = nn.Sequential()
        for i, width in enumerate(widths):
            blocks = residuals(channels, width, config.blocks + 1)
            highest = i + 1 == len(widths)
            self.levels.append(nn.Sequential(*blocks, *([] if highest else upsample(width))))
            channels = width
        self.norm0 = group_norm(channels)
        self.conv1 = conv3x3(channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv0(z)  # B C h w
        x = self.middle(x)  # B C h w
        x = self.levels(x)  # B hidden H W
        return self.conv1(F.silu(self.norm0(x)))  # B 3 H W


class VQGAN(nn.Module):
    """Images float [B, 3, H, W] in [-1, 1] <-> codes int64 [B, N], row by row"""

    file: Path  # its weights on disk, and
    mark: str  # 12 hex digits that name them (see load_vqgan)

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.to_code = nn.Conv2d(config.z_channels, config.quant_dim, 1)
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.quant_dim))
        self.from_code = nn.Conv2d(config.quant_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        z = self.to_code(self.encoder(images))  # B quant_dim h w
        return nearest(z.flatten(2).transpose(1, 2), self.codebook)  # B N

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        grid = math.isqrt(codes.shape[1])
        z = self.codebook[codes].transpose(1, 2)  # B quant_dim N
        z = z.unflatten(2, (grid, grid))  # B quant_dim h w
        return self.decoder(self.from_code(z)).clamp(-1, 1)  # B 3 H W


# ------------------------------------------------------------------------ beside a checkpoint
def load_vqgan(path: str | Path, option: str, device: torch.device, shape: dict) -> VQGAN:
    """The frozen image tokenizer beside a VLA of that shape (its config as a dictionary).

    Refuses, naming the option that asked for it, a checkpoint without one or with one whose codes
    do not fit the VLA."""
    folder = common.latest(path)
    with common.refuse(
        f"--{option} {folder}: expected a VQGAN, as official.convert puts it beside a model",
        (KeyError, TypeError, OSError, ValueError, SafetensorError),
    ):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        vqgan = VQGAN(VQGANConfig(**config["vqgan"]))
        vqgan.file = folder / "vqgan.safetensors"
        vqgan.mark = hashlib.sha256(vqgan.file.read_bytes()).hexdigest()[:12]
        load_strictly(vqgan, load_file(vqgan.file))
        check_fit(vqgan.config, shape["patch_size"], shape["vision_vocab"])
    return vqgan.to(device).eval()


def check_fit(config: VQGANConfig, patch_size: int, vision_vocab: int) -> None:
    """Raises ValueError if a VLA with these pixels per code and vision tokens cannot read codes"""
    pixels = 2 ** (len(config.multipliers) - 1)  # a side that one code stands for
    if pixels != patch_size or not config.codebook_size <= END_OF_IMAGE < vision_vocab:
        raise ValueError(
            f"{config.codebook_size} codes for {pixels} pixels each do not fit a model of "
            f"{vision_vocab} for {patch_size}"
        )


# ------------------------------------------------------------------------ from the official pickle
# ours -> official, one replacement after another, for example:
#   encoder.levels.0.1.norm0.weight -> encoder/DownsamplingBlock_0/ResnetBlock_1/GroupNorm_0/scale
#   decoder.levels.1.4.bias -> decoder/UpsamplingBlock_1/Upsample_0/Conv_0/bias
VQGAN_NAMES = (
    (r"^codebook$", "quantize/embeddings"),
    (r"^to_code", "quant_conv"),
    (r"^from_code", "post_quant_conv"),
    (r"^(en|de)coder\.", r"\1coder/"),
    (r"(encoder/)levels\.(\d+)\.", r"\1DownsamplingBlock_\2/"),
    (r"middle\.", "MidBlock_0/"),
    (r"(decoder/)levels\.(\d+)\.", r"\1UpsamplingBlock_\2/"),
    (r"conv(\d)", r"Conv_\1"),
    (r"(Down|Up)(.*)/\d\.(weight|bias)", r"\1\2/\1sample_0/Conv_0.\3"),
    (r"/(\d+)\.", r"/ResnetBlock_\1/"),
    (r"norm(\d)\.weight", r"norm\1/scale"),
    (r"norm(\d)", r"GroupNorm_\1"),
    (r"\.weight$", "/kernel"),
    (r"\.bias$", "/bias"),
)


def from_hwio(kernel: Tensor) -> Tensor:
    """A convolution's kernel (height, width, in, out) -> torch's (out, in, height, width)"""
    return kernel.permute(3, 2, 0, 1)


def vqgan_counterpart(name: str, shape: Shape) -> Counterpart:
    """Our VQGAN's tensor in the official pickle"""
    official = rename(name, VQGAN_NAMES)
    if len(shape) < 4:
        return Counterpart(official, shape)
    out, inner, height, width = shape
    return Counterpart(official, (height, width, inner, out), from_hwio)


def from_vqgan(path: Path, image_size: int = 0) -> tuple[VQGANConfig, Readers]:
    """LWM's pickled image tokenizer -> its shape, and its tensors.  image_size 0: 256

    Raises ValueError that names the tensors which are missing, unexpected or misshapen."""
    source = in_memory(read_pickle(path))
    level = "encoder/DownsamplingBlock_"
    hidden = read_size(
        source,
        ("encoder/Conv_0/bias", 0),
        ("encoder/Conv_0/kernel", 3),
        (f"{level}0/ResnetBlock_0/GroupNorm_0/scale", 0),
    )
    multipliers = []
    for i in range(max(1, count_numbers(source, rf"{level}(\d+)/"))):
        block = f"{level}{i}/ResnetBlock_0"
        places = (f"{block}/Conv_0/bias", 0), (f"{block}/Conv_0/kernel", 3)
        width = read_size(source, *places, (f"{block}/Conv_1/bias", 0))
        multipliers.append(width // hidden)
    config = VQGANConfig(
        image_size=image_size or 256,
        hidden=hidden,
        multipliers=multipliers,
        blocks=count_numbers(source, rf"{level}0/ResnetBlock_(\d+)/"),
        z_channels=read_size(
            source,
            ("encoder/Conv_1/bias", 0),
            ("encoder/Conv_1/kernel", 3),
            ("quant_conv/kernel", 2),
        ),
        quant_dim=read_size(
            source,
            ("quantize/embeddings", 1),
            ("quant_conv/bias", 0),
            ("post_quant_conv/kernel", 2),
        ),
        codebook_size=read_size(source, ("quantize/embeddings", 0)),
    )
    return config, match(VQGAN, config, source, vqgan_counterpart)
