"""Stage 1: the latent action quantizer (paper 3.1, figure 8).  Letters: see __init__.py"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import option, patchify


@dataclass
class LAQConfig:
    """Shape of a latent action quantizer; the defaults are the paper's (343,796,080 parameters)."""

    image_size: int = option(256, "pixels, square")
    patch_size: int = option(
        32, "pixels; 256/32 gives the 8x8 grid the official CNN for 4 codes needs"
    )
    dim: int = option(1024, "width of the three transformers")
    spatial_depth: int = option(8, "layers of the spatial encoder")
    temporal_depth: int = option(8, "layers of the temporal encoder")
    decoder_depth: int = option(8, "layers of the decoder (official: as the spatial encoder)")
    heads: int = option(16, "attention heads")
    dim_head: int = option(64, "width of a head")
    quant_dim: int = option(32, "width of a code")
    codebook_size: int = option(8, "entries of the codebook")
    code_len: int = option(4, "codes per pair: 8^4 = 4096 latent actions")
    code_relu: bool = option(
        False, "ReLU after a code_cnn of one convolution, as runs of older versions have it"
    )
    codebook_init: float = option(1.0, "standard deviation of fresh codebook entries (official 1)")
    residual: bool = option(False, "the decoder draws x_{t+H} - x_t (official: x_{t+H} itself)")
    official_peg: bool = option(
        False, "the temporal PEG reads its memory in the wrong order, as officially"
    )
    official_code_read: bool = option(
        False, "the decoder reads a (K, Q) block of codes as (Q, K), as officially"
    )
    official_counting: bool = option(
        False, "the official dead-code rule, which lets a codebook collapse"
    )

    @property
    def grid(self) -> int:
        """Patches per side of a frame"""
        return self.image_size // self.patch_size


class PEG(nn.Module):
    """Position encoding generator: a depth-wise 3x3x3 convolution, causal in time (code)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(dim, dim, 3, groups=dim)
        # Ours: taps into the past start at zero.  Both frames are then seen alike, d is zero where
        # nothing moves, and no constant part of d drowns the rest (docs/deviations.md, 7).
        with torch.no_grad():
            self.conv.weight[:, :, :2] = 0

    def forward(self, x: Tensor, grid: int) -> Tensor:
        """x [B, T, N, D] with N = grid^2 -> the same shape"""
        return self.convolve(x, grid) if x.shape[1] > 2 else self.convolve_two(x, grid)

    def convolve(self, x: Tensor, grid: int) -> Tensor:
        """The plain form, for any T (the LAQ itself has one or two frames): zeros around each frame
        and two frames of zeros before the first"""
        y = x.unflatten(2, (grid, grid)).movedim(-1, 1)  # B D T h w
        y = F.pad(y, (1, 1, 1, 1, 2, 0))  # B D T+2 h+2 w+2
        return self.conv(y).movedim(1, -1).flatten(2, 3)  # B T N D

    def convolve_two(self, x: Tensor, grid: int) -> Tensor:
        """`convolve` for one or two frames, as a 2-D convolution per tap: on CPUs the backward pass
        of a depth-wise Conv3d is slow, and taps that would see only padding are left out.

        Gain in training and inference: tiny [64, 2, 64, 96] 3.5 and 0.9, lapa [8, 2, 64, 1024] 5.5
        and 0.9; with one frame, as in the decoder, tiny 7.7 and 2.5, lapa 10.2 and 2.6.
        Test: test_peg_is_a_causal_convolution"""
        out = self.tap(2, x, grid) + self.conv.bias
        if x.shape[1] == 2:
            past = self.tap(1, x[:, :1], grid)  # B 1 N D: what the first frame adds to the second
            out = out + F.pad(past, (0, 0, 0, 0, 1, 0))  # B 2 N D, zeros for the first frame
        return out

    def tap(self, t: int, frames: Tensor, grid: int) -> Tensor:
        """Frames [B, n, N, D] under slice t of the kernel (2: now, 1: one step back)"""
        y = frames.reshape(-1, grid, grid, frames.shape[-1]).movedim(-1, 1)  # Bn D h w
        y = F.conv2d(y, self.conv.weight[:, :, t], padding=1, groups=y.shape[1])
        return y.movedim(1, -1).reshape(frames.shape)  # B n N D


class MisreadPEG(PEG):
    """The official temporal PEG: its memory is laid out as (N, T) but read as (T, N), so that it
    convolves across halves of the image (docs/deviations.md, 2).  Converted weights need it."""

    def forward(self, x: Tensor, grid: int) -> Tensor:
        B, T, N, D = x.shape
        memory = x.transpose(1, 2).contiguous()  # B N T D
        misread = memory.view(B, T, N, D)
        return super().forward(misread, grid).reshape(B, N, T, D).transpose(1, 2)  # B T N D


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T + bias) v, the plain form.

    q [B, N, heads, dim_head], k and v [B, M, heads, dim_head], bias [1, heads, N, M] -> as q"""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # B heads N dim_head
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0).transpose(1, 2)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """`attend`, written out: on CPUs torch's fused attention is slower where there is a bias.

    Gain in training and inference: tiny [128, 64, 4, 24] 1.1 and 1.9, lapa [16, 64, 16, 64] 1.2 and
    1.6.
    Test: test_attention_over_the_grid_is_attention"""
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # B heads N dim_head
    logits = q @ k.mT  # B heads N M
    if bias is not None:
        logits = logits + bias
    return (logits.softmax(-1) @ v).transpose(1, 2)  # B N heads dim_head


def attend_to_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` for two keys without a bias, the frames of a pair: softmax over two is a sigmoid of
    the difference, and no matrix products of size two are left.

    Gain in training and inference: tiny [4096, 2, 4, 24] 1.6 and 4.8, lapa [512, 2, 16, 64] 1.1
    and 2.3.
    Test: test_attention_is_attention_also_over_two_frames"""
    gap = k[:, 1:] - k[:, :1]  # B 1 heads dim_head
    second = torch.sigmoid((q * gap).sum(-1, keepdim=True))  # B N heads 1, weight of the second
    v = v.to(second.dtype)  # autocast makes float32 of sums
    return torch.lerp(v[:, :1], v[:, 1:], second)  # B N heads dim_head


def unit(x: Tensor) -> Tensor:
    """Vectors [.., dim_head] scaled to length 1"""
    return x * x.norm(dim=-1, keepdim=True).clamp(min=1e-12).reciprocal()


class Attention(nn.Module):
    """Cosine attention (code): unit queries and keys, a scale per channel, logits times 8"""

    def __init__(self, dim: int, heads: int, dim_head: int, cross: bool = False) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.norm = nn.LayerNorm(dim, bias=False)  # the official beta is a buffer of zeros
        # The official self-attention never uses its context norm; we carry the parameter so that
        # counts and keys agree with official files.
        self.context_norm = nn.LayerNorm(dim, bias=False)
        self.q_scale = nn.Parameter(torch.ones(dim_head))
        self.k_scale = nn.Parameter(torch.ones(dim_head))
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        if cross:  # rows alternate key, value, key, value
            self.null_kv = nn.Parameter(torch.randn(heads, 4, dim_head))
        self.cross = cross

    def forward(
        self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """x [B, N, D], context [B, M, D] for cross-attention, bias [1, heads, N, N] -> [B, N, D]"""
        # Only the queries see a LayerNorm in self-attention: keys and values read the raw x (code).
        source = self.context_norm(context) if self.cross else x  # B M D
        q = self.to_q(self.norm(x)).unflatten(-1, (self.heads, -1))  # B N heads dim_head
        k, v = self.to_kv(source).chunk(2, dim=-1)  # B M inner
        k = k.unflatten(-1, (self.heads, -1))  # B M heads dim_head
        v = v.unflatten(-1, (self.heads, -1))
        if self.cross:  # two learned keys and values in front
            null = self.null_kv.transpose(0, 1).expand(len(x), -1, -1, -1).to(k.dtype)
            k = torch.cat((null[:, 0::2], k), dim=1)  # B 2+M heads dim_head
            v = torch.cat((null[:, 1::2], v), dim=1)
        q = unit(q)
        # q_scale and k_scale multiply the same products, so the keys take both; logits times 8.
        k = unit(k) * (8 * self.q_scale * self.k_scale)
        # Each of these equals attend(q, k, v, bias).  Cross-attention has no bias and would be
        # faster by `attend` itself; it keeps the products, to which all our results are exact.
        if k.shape[1] == 2 and bias is None:
            y = attend_to_two(q, k, v)
        else:
            y = attend_by_products(q, k, v, bias)
        return self.to_out(y.flatten(2))  # B N D


class GEGLU(nn.Module):
    """[.., 2 n] -> [.., n]: the first half, gated by gelu of the second"""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class Layer(nn.Module):
    """x += PEG(x); x += attention(x); [x += cross(x)]; x += feed-forward(x)  (code)

    over_time: attention runs over the T frames at each patch, else over the N patches of a frame"""

    def __init__(
        self, c: LAQConfig, over_time: bool = False, cross: bool = False, peg: type[PEG] = PEG
    ) -> None:
        super().__init__()
        inner = int(4 * 2 / 3 * c.dim)
        self.over_time = over_time
        self.grid = c.grid
        self.peg = peg(c.dim)
        self.attention = Attention(c.dim, c.heads, c.dim_head)
        self.cross = Attention(c.dim, c.heads, c.dim_head, cross=True) if cross else None
        self.ff = nn.Sequential(
            nn.LayerNorm(c.dim),
            nn.Linear(c.dim, 2 * inner, bias=False),
            GEGLU(),
            nn.Linear(inner, c.dim, bias=False),
        )

    def forward(
        self, x: Tensor, bias: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """x [B, T, N, D]; bias [1, heads, N, N] of self-attention; context [B, K, D] of
        cross-attention, where T is 1 -> [B, T, N, D]"""
        B, T, N, D = x.shape
        x = x + self.peg(x, self.grid)  # B T N D
        rows = (  # attention runs over their second axis
            x.transpose(1, 2).reshape(B * N, T, D) if self.over_time else x.reshape(B * T, N, D)
        )
        rows = rows + self.attention(rows, bias=bias)
        if self.cross is not None:
            rows = rows + self.cross(rows, context)
        rows = rows + self.ff(rows)
        if self.over_time:
            return rows.reshape(B, N, T, D).transpose(1, 2)  # B T N D
        return rows.reshape(B, T, N, D)


class Transformer(nn.Module):
    """`depth` layers and a closing norm, attending over space or over time"""

    def __init__(
        self,
        c: LAQConfig,
        depth: int,
        over_time: bool = False,
        cross: bool = False,
        peg: type[PEG] = PEG,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(c, over_time, cross, peg) for _ in range(depth))
        self.norm_out = nn.LayerNorm(c.dim, bias=False)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """x [B, T, N, D]; bias and context: see Layer -> [B, T, N, D]"""
        for layer in self.layers:
            x = layer(x, bias, context)
        return self.norm_out(x)


class PositionBias(nn.Module):
    """Continuous position bias (Swin V2): an MLP over signed log distances between patches."""

    def __init__(self, dim: int, heads: int, grid: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, dim),
            nn.LeakyReLU(0.1),
            nn.Linear(dim, dim),
            nn.LeakyReLU(0.1),
            nn.Linear(dim, heads),
        )
        self.grid = grid

    def forward(self) -> Tensor:
        """-> bias of attention logits, [1, heads, N, N]"""
        return self.look_up()

    def of_offsets(self, offset: Tensor) -> Tensor:
        """Offsets (dy, dx) in patches, int [.., 2] -> biases [.., heads]"""
        offset = offset.float()
        return self.net(offset.sign() * torch.log(offset.abs() + 1))

    def offsets(self) -> Tensor:
        """(dy, dx) between each two patches, int [N, N, 2]"""
        side = torch.arange(self.grid, device=self.net[0].weight.device)
        place = torch.cartesian_prod(side, side)  # N 2
        return place[:, None] - place[None]

    def compute(self) -> Tensor:
        """The plain form of `forward`: the MLP on all N^2 offsets"""
        return self.of_offsets(self.offsets()).permute(2, 0, 1)[None]  # 1 heads N N

    def look_up(self) -> Tensor:
        """`compute` with the MLP on the (2 grid - 1)^2 distinct offsets and a lookup: 225
        instead of 4096 on a grid of 8.

        Gain in training and inference: tiny 4.5 and 3.6, lapa 16 and 13.
        Test: test_position_bias_depends_on_the_offset_alone"""
        g = self.grid
        line = torch.arange(1 - g, g, device=self.net[0].weight.device)
        table = self.of_offsets(torch.cartesian_prod(line, line)).T  # heads (2g-1)^2
        dy, dx = (self.offsets() + g - 1).unbind(-1)  # N N, from 0
        return table[:, dy * (2 * g - 1) + dx][None]  # 1 heads N N


def code_cnn(grid: int, code_len: int, q: int, relu: bool = False) -> nn.Sequential:
    """The CNN that turns a grid of patches into `code_len` vectors (paper silent; code).
    [B, q, grid, grid] -> [B, q, ..], code_len places

    A convolution of stride 2 halves the grid; what remains to be done depends on code_len.  relu:
    see LAQConfig.  Raises ValueError for a grid that cannot give code_len vectors."""

    def halve() -> nn.Conv2d:
        return nn.Conv2d(q, q, 3, stride=2, padding=1)

    kernels = {1: (4, 4), 2: (3, 4), 4: (3, 3)}  # they leave 1x1, 2x1, 2x2 of a 4x4 map
    if math.ceil(grid / 2) ** 2 == code_len:  # official at 64 and 256 codes; ours on small grids
        return nn.Sequential(halve(), nn.ReLU()) if relu else nn.Sequential(halve())
    if math.ceil(grid / 2) == 4 and code_len in kernels:
        return nn.Sequential(halve(), nn.ReLU(), nn.Conv2d(q, q, kernels[code_len]))
    if math.ceil(grid / 4) ** 2 == code_len:  # official at 16 codes
        return nn.Sequential(halve(), nn.ReLU(), halve())
    raise ValueError(
        f"code_len {code_len} cannot be made of {grid}x{grid} patches: use 1, 2 or 4 "
        "with 7 or 8 patches per side, or code_len = (patches / 2)^2 or (patches / 4)^2"
    )


def nearest(d: Tensor, codebook: Tensor) -> Tensor:
    """d [.., Q], codebook [V, Q] -> int64 [..], the entry nearest by squared Euclidean distance"""
    with torch.autocast(d.device.type, enabled=False):
        d = d.float()
        codebook = codebook.float()
        # |d - c|^2 = |d|^2 - 2 d c + |c|^2
        distance = (d**2).sum(-1, keepdim=True) - 2 * d @ codebook.T + (codebook**2).sum(-1)
    return distance.argmin(-1)  # of [.., V]


class Quantizer(nn.Module):
    """NSVQ (Vali and Backstrom 2022) whose dead codes are revived.

    State: `codebook` [V, Q] and the buffer `uses` [V], of each entry since the last replacement."""

    def __init__(self, c: LAQConfig) -> None:
        super().__init__()
        self.c = c
        self.project_in = nn.Linear(c.dim, c.quant_dim)
        self.project_out = nn.Linear(c.quant_dim, c.dim)
        self.cnn = code_cnn(c.grid, c.code_len, c.quant_dim, c.code_relu)
        self.codebook = nn.Parameter(torch.randn(c.codebook_size, c.quant_dim) * c.codebook_init)
        self.register_buffer("uses", torch.zeros(c.codebook_size))

    def difference(self, first: Tensor, last: Tensor) -> Tensor:
        """Patch tokens of both frames [B, N, D] -> d = cnn(last) - cnn(first), [B, K, Q]"""
        return self.summary(last) - self.summary(first)

    def summary(self, x: Tensor) -> Tensor:
        """Patch tokens of a frame [B, N, D] -> [B, K, Q]"""
        x = self.project_in(x).transpose(1, 2)  # B Q N
        x = x.unflatten(2, (self.c.grid, self.c.grid))  # B Q h w
        return self.cnn(x).flatten(2).transpose(1, 2)  # B K Q

    def nsvq_substitute(self, d: Tensor, indices: Tensor, noise: Tensor | None = None) -> Tensor:
        """The training value d + |d - c| v/|v|, v ~ N(0, I): noise of the error's size in place of
        the error, so that gradients reach encoder and codebook.

        d [B, K, Q], indices int64 [B, K], noise v [B, K, Q] (None: drawn here; quantize.py draws
        it for all processes) -> [B, K, Q]"""
        noise = torch.randn_like(d) if noise is None else noise
        error = (d - self.codebook[indices]).norm(dim=-1, keepdim=True)  # B K 1
        return d + (error / noise.norm(dim=-1, keepdim=True) + 1e-12) * noise

    def tokens(self, values: Tensor) -> Tensor:
        """Quantized values [B, K, Q] -> action tokens for the decoder [B, K, D]"""
        if self.c.official_code_read:  # docs/deviations.md, 3
            values = values.reshape(len(values), self.c.quant_dim, -1).transpose(1, 2)
        return self.project_out(values)

    @torch.no_grad()
    def count_uses(self, indices: Tensor) -> None:
        """After a step: add every use of an entry in indices, int64 [B, K] of all processes"""
        self.uses += torch.bincount(indices.flatten(), minlength=len(self.uses))

    @torch.no_grad()
    def pull_to_means(self, d: Tensor, indices: Tensor, pull: float) -> None:
        """After a step: move used entries the share `pull` of the way to the mean of what chose
        them.  0: the gradient alone moves the codebook, as in the paper.

        d [B, K, Q], indices int64 [B, K], of all processes"""
        chosen = F.one_hot(indices.flatten(), len(self.codebook)).to(d.dtype)  # BK V
        uses = chosen.sum(0)[:, None]  # V 1
        mean = chosen.T @ d.flatten(0, 1) / uses.clamp(min=1)  # V Q
        self.codebook += pull * (uses > 0) * (mean - self.codebook)

    @torch.no_grad()
    def replace_dead_codes(self, d: Tensor, dead_below: float = 0.1) -> int:
        """Move each entry with under `dead_below` of a fair share of the uses onto an encoder
        output of the batch d [B, K, Q], chosen with probability ~ squared distance to the live
        entries (k-means++).  -> how many moved"""
        now = torch.bincount(nearest(d, self.codebook).flatten(), minlength=len(self.uses))  # V
        # A batch that uses at most half of the codebook has collapsed.  Then only what it uses
        # counts: entries that take turns over time would never look dead.
        if (now > 0).sum() * 2 <= len(now):
            self.uses *= now > 0
        dead = self.uses < dead_below * self.uses.sum() / len(self.uses)  # V
        points = d.flatten(0, 1).float()  # BK Q
        taken = self.codebook[~dead].float()
        for i in dead.nonzero().flatten().tolist():
            gap = torch.ones(len(points), device=d.device)  # BK
            if len(taken):
                gap = torch.cdist(points, taken).min(dim=1).values ** 2
            far = points[torch.multinomial(gap + 1e-12, 1)]  # 1 Q
            self.codebook[i] = far[0].to(self.codebook.dtype)
            taken = torch.cat((taken, far))
        self.uses.zero_()
        return int(dead.sum())


class OfficialQuantizer(Quantizer):
    """The official counting and replacement, which let a codebook collapse (docs/deviations.md, 1;
    laq/laq_model/nsvq.py, NSVQ.forward and NSVQ.replace_unused_codebooks)"""

    @torch.no_grad()
    def count_uses(self, indices: Tensor) -> None:
        """An entry counts once per batch, however often it was used"""
        self.uses[indices.flatten()] += 1

    @torch.no_grad()
    def replace_dead_codes(self, d: Tensor, dead_below: float = 0.1) -> int:
        """Entries used less than dead_below x batch size times become copies of others.
        -> how many"""
        dead = self.uses / len(d) < dead_below  # V
        live = self.codebook[~dead]
        if len(live):
            pick = torch.randint(len(live), (int(dead.sum()),), device=d.device)
            noise = 1e-12 * torch.randn_like(self.codebook[dead])
            self.codebook[dead] = live[pick] + noise
        self.uses.zero_()
        return int(dead.sum())


class LAQ(nn.Module):
    """Latent action quantizer.  Frames are float [.., 3, H, W] in [0, 1].

    Raises ValueError for an image_size that patch_size does not divide, and see `code_cnn`."""

    def __init__(self, config: LAQConfig) -> None:
        super().__init__()
        c = self.config = config
        if c.image_size % c.patch_size:
            raise ValueError(f"patch_size {c.patch_size} must divide image_size {c.image_size}")
        pixels = 3 * c.patch_size**2
        temporal_peg = MisreadPEG if c.official_peg else PEG
        quantizer = OfficialQuantizer if c.official_counting else Quantizer
        self.patch_embed = nn.Sequential(
            nn.LayerNorm(pixels), nn.Linear(pixels, c.dim), nn.LayerNorm(c.dim)
        )
        self.position_bias = PositionBias(c.dim, c.heads, c.grid)
        self.spatial_encoder = Transformer(c, c.spatial_depth)
        self.temporal_encoder = Transformer(c, c.temporal_depth, over_time=True, peg=temporal_peg)
        self.quantizer = quantizer(c)
        self.decoder = Transformer(c, c.decoder_depth, cross=True)
        self.to_pixels = nn.Linear(c.dim, pixels)
        self.all_layers = [module for module in self.modules() if isinstance(module, Layer)]
        if c.residual:  # begin with "nothing moves"
            nn.init.zeros_(self.to_pixels.weight)
            nn.init.zeros_(self.to_pixels.bias)

    def patches(self, frames: Tensor) -> Tensor:
        """[B, T, 3, H, W] -> patch embeddings [B, T, N, D]"""
        return self.patch_embed(patchify(frames, self.config.patch_size))

    def encode(self, tokens: Tensor, bias: Tensor) -> Tensor:
        """Patch embeddings [B, 2, N, D], bias [1, heads, N, N] -> d [B, K, Q], not yet quantized"""
        x = self.spatial_encoder(tokens, bias)  # B 2 N D
        x = self.temporal_encoder(x)  # B 2 N D
        return self.quantizer.difference(x[:, 0], x[:, 1])

    def difference(self, pair: Tensor) -> Tensor:
        """pair [B, 2, 3, H, W] -> d [B, K, Q], what the codes are made of"""
        return self.encode(self.patches(pair), self.position_bias())

    def decode(self, frame: Tensor, first: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """x_t [B, 3, H, W], its embeddings [B, 1, N, D], quantized d [B, K, Q] -> x_{t+H}"""
        context = self.quantizer.tokens(values)  # B K D
        x = self.to_pixels(self.decoder(first, bias, context))[:, 0]  # B N 3pp
        x = x.mT.contiguous().unflatten(2, (self.config.grid, -1))  # B 3pp h w
        x = F.pixel_shuffle(x, self.config.patch_size)  # B 3 H W
        return frame + x if self.config.residual else x

    def forward(
        self, pair: Tensor, shifted: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Training pass (paper 3.1): the MSE of the future frame drawn through NSVQ.

        pair [B, 2, 3, H, W] is (x_t, x_{t+H}); shifted, of the same shape, is what the encoder
        sees in its place (quantize.py, --shift); noise [B, K, Q]: see nsvq_substitute.
        -> loss (scalar), d float32 [B, K, Q], indices int64 [B, K]"""
        bias = self.position_bias()  # 1 heads N N
        tokens = self.patches(pair)  # B 2 N D
        d = self.encode(tokens if shifted is None else self.patches(shifted), bias).float()
        indices = nearest(d, self.quantizer.codebook)
        value = self.quantizer.nsvq_substitute(d, indices, noise)
        # The decoder must not shape the patch embedding: official code detaches here.
        predicted = self.decode(pair[:, 0], tokens[:, :1].detach(), value, bias)
        return F.mse_loss(predicted.float(), pair[:, 1]), d, indices

    @torch.no_grad()
    def label(self, pair: Tensor) -> Tensor:
        """pair [B, 2, 3, H, W] -> latent action, int64 [B, K] in [0, codebook_size)"""
        return nearest(self.difference(pair), self.quantizer.codebook)

    @torch.no_grad()
    def imagine(self, frame: Tensor, codes: Tensor) -> Tensor:
        """World model: x_t [B, 3, H, W] and codes int [B, K] -> predicted x_{t+H} [B, 3, H, W]"""
        first = self.patches(frame[:, None])  # B 1 N D
        return self.decode(frame, first, self.quantizer.codebook[codes], self.position_bias())
