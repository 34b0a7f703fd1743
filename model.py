"""The two networks of LAPA: the latent action quantizer (LAQ) and the vision-language-action model.

LAQ  (paper 3.1, figure 8)  a C-ViViT style VQ-VAE: two frames in, `code_len` codes out, and a
     decoder that draws the second frame from the first one and the codes.  `quantize.py` trains it.
VLA  (paper 3.2, 3.3)  a LLaMA body over four vocabularies (text, vision, latent action, robot
     action); every position belongs to one of them.  `pretrain.py` and `finetune.py` train it.
VQGAN  LWM's image tokenizer, frozen: the full-size VLA reads an image as its codes.

Letters in shape comments, everywhere: B batch, T time (2 in a pair), C colour, H W pixels, N
patches of a frame, D width, K code_len, Q quant_dim, L sequence length, V a vocabulary's size."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common import load_strictly, put, whole


# ------------------------------------------------------------------------ stage 1: LAQ
@dataclass
class LAQConfig:
    """Shape of a latent action quantizer; the defaults are the paper's (343,796,080 parameters)."""

    image_size: int = 256  # pixels, square
    patch_size: int = 32  # pixels; 256/32 gives the 8x8 grid the official CNN for 4 codes needs
    dim: int = 1024
    spatial_depth: int = 8  # layers of the spatial encoder
    temporal_depth: int = 8  # layers of the temporal encoder
    decoder_depth: int = 8  # layers of the decoder (official: as the spatial encoder)
    heads: int = 16
    dim_head: int = 64
    quant_dim: int = 32
    codebook_size: int = 8
    code_len: int = 4  # codes a pair: 8^4 = 4096 latent actions
    code_relu: bool = False  # ReLU after code_cnn's only convolution, as older runs of ours have it
    codebook_init: float = 1.0  # standard deviation of fresh codebook entries (official 1)
    residual: bool = False  # the decoder draws x_{t+H} - x_t (official: x_{t+H} itself)
    official_peg: bool = False  # temporal PEG takes (b h w) t d memory for b t h w d
    official_code_read: bool = False  # a (K, Q) block enters the decoder re-read as (Q, K)
    official_counting: bool = False  # the official dead-code rule, which lets a codebook collapse

    @property
    def grid(self):
        return self.image_size // self.patch_size


def patchify(frames, p):
    """[.., C, H, W] -> patches of p x p pixels [.., N, C p p]; each runs channel, row, column"""
    return F.pixel_unshuffle(frames, p).flatten(-2).mT.contiguous()


class PEG(nn.Module):
    """Position encoding generator: a depth-wise 3x3x3 convolution, causal in time. [B, T, N, D]"""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv3d(dim, dim, 3, groups=dim)
        # Ours: taps into the past start at zero.  Both frames are then seen alike, d is zero where
        # nothing moves, and no constant part of d drowns the rest (docs/deviations.md, 7).
        with torch.no_grad():
            self.conv.weight[:, :, :2] = 0

    def forward(self, x, grid):
        def tap(t, frames):  # what frame t of the kernel (2: now) makes of [B, n, N, D]
            y = frames.reshape(-1, grid, grid, frames.shape[-1]).movedim(-1, 1)  # Bn D h w
            y = F.conv2d(y, self.conv.weight[:, :, t], padding=1, groups=y.shape[1])
            return y.movedim(1, -1).reshape(frames.shape)

        # One 2-D convolution for each reach into the past; what would see only padding is left out.
        out = tap(2, x) + self.conv.bias
        for past in range(1, min(3, x.shape[1])):
            out = out + F.pad(tap(2 - past, x[:, :-past]), (0, 0, 0, 0, past, 0))
        return out


class Attention(nn.Module):
    """Cosine attention: unit queries and keys, a learned scale a channel, logits times 8."""

    def __init__(self, dim, heads, dim_head, cross=False):
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

    def forward(self, x, context=None, bias=0):
        """x [B, N, D], context [B, M, D] for cross-attention, bias [1, heads, N, N] -> [B, N, D]"""
        split = lambda y: y.unflatten(-1, (self.heads, -1))  # B N heads dim_head
        unit = lambda y: y * y.norm(dim=-1, keepdim=True).clamp(min=1e-12).reciprocal()
        # Only the queries see a LayerNorm in self-attention: keys and values read the raw x (code).
        source = self.context_norm(context) if self.cross else x
        q = split(self.to_q(self.norm(x)))
        k, v = map(split, self.to_kv(source).chunk(2, dim=-1))
        if self.cross:
            null = self.null_kv.transpose(0, 1).expand(len(x), -1, -1, -1).to(k.dtype)
            k = torch.cat((null[:, 0::2], k), dim=1)
            v = torch.cat((null[:, 1::2], v), dim=1)
        q, k = unit(q), unit(k) * (8 * self.q_scale * self.k_scale)
        if k.shape[1] == 2:  # over time, no bias: softmax over two is a sigmoid
            second = torch.sigmoid((q * (k[:, 1:] - k[:, :1])).sum(-1, keepdim=True))
            v = v.to(second.dtype)
            return self.to_out(torch.lerp(v[:, :1], v[:, 1:], second).flatten(2))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # B heads N dim_head
        return self.to_out(((q @ k.mT + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def forward(self, x):
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class Layer(nn.Module):
    """x += PEG(x); x += attention(x); [x += cross(x)]; x += feed-forward(x)"""

    def __init__(self, dim, heads, dim_head, cross=False):
        super().__init__()
        inner = int(4 * 2 / 3 * dim)
        self.peg = PEG(dim)
        self.attention = Attention(dim, heads, dim_head)
        self.cross = Attention(dim, heads, dim_head, cross=True) if cross else None
        self.ff = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, 2 * inner, bias=False),
            GEGLU(),
            nn.Linear(inner, dim, bias=False),
        )

    def forward(self, x, grid, over_time=False, misread=False, bias=0, context=None):
        B, T, N, D = x.shape
        if misread:  # the quirk: memory laid out as (N, T) is taken for (T, N)
            memory = x.transpose(1, 2).reshape(B, T, N, D)
            x = x + self.peg(memory, grid).reshape(B, N, T, D).transpose(1, 2)
        else:
            x = x + self.peg(x, grid)
        rows = x.transpose(1, 2).flatten(0, 1) if over_time else x.flatten(0, 1)
        rows = rows + self.attention(rows, bias=bias)  # (B N) T D over time, else (B T) N D
        if self.cross is not None:
            rows = rows + self.cross(rows, context)
        rows = rows + self.ff(rows)
        return rows.unflatten(0, (B, N)).transpose(1, 2) if over_time else rows.unflatten(0, (B, T))


class Transformer(nn.Module):
    """`depth` layers and a closing norm, attending over space or over time. [B, T, N, D]"""

    def __init__(self, c, depth, over_time=False, cross=False):
        super().__init__()
        self.over_time, self.grid, self.misread = over_time, c.grid, over_time and c.official_peg
        self.layers = nn.ModuleList(Layer(c.dim, c.heads, c.dim_head, cross) for _ in range(depth))
        self.norm_out = nn.LayerNorm(c.dim, bias=False)

    def forward(self, x, bias=0, context=None):
        for layer in self.layers:
            x = layer(x, self.grid, self.over_time, self.misread, bias, context)
        return self.norm_out(x)


class PositionBias(nn.Module):
    """Continuous position bias (Swin V2): an MLP over signed log distances. -> [1, heads, N, N]"""

    def __init__(self, dim, heads, grid):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, dim),
            nn.LeakyReLU(0.1),
            nn.Linear(dim, dim),
            nn.LeakyReLU(0.1),
            nn.Linear(dim, heads),
        )
        self.grid = grid

    def forward(self):
        # Only (2 grid - 1)^2 of the N^2 distances differ: run the MLP on those, then look up.
        g, device = self.grid, self.net[0].weight.device
        line = torch.arange(1 - g, g, device=device)
        delta = torch.cartesian_prod(line, line).float()  # dy, dx
        table = self.net(delta.sign() * torch.log(delta.abs() + 1)).T  # heads, (2g-1)^2
        at = torch.cartesian_prod(*[torch.arange(g, device=device)] * 2)
        dy, dx = (at[:, None] - at[None] + g - 1).unbind(-1)  # N N
        return table[:, dy * (2 * g - 1) + dx][None]


def code_cnn(grid, code_len, q, relu=False):
    """The CNN that turns a grid of patches into `code_len` vectors (paper silent; code).

    A stride-2 convolution halves the grid; what remains to be done depends on code_len.  relu: see
    LAQConfig.
    Raises ValueError for a grid that cannot give code_len vectors."""
    down = lambda: nn.Conv2d(q, q, 3, stride=2, padding=1)
    valid = {1: (4, 4), 2: (3, 4), 4: (3, 3)}  # kernels that leave 1x1, 1x2, 2x2 of a 4x4 map
    if math.ceil(grid / 2) ** 2 == code_len:  # official at 64 and 256 codes; ours on small grids
        return nn.Sequential(down(), nn.ReLU()) if relu else nn.Sequential(down())
    if math.ceil(grid / 2) == 4 and code_len in valid:
        return nn.Sequential(down(), nn.ReLU(), nn.Conv2d(q, q, valid[code_len]))
    if math.ceil(grid / 4) ** 2 == code_len:  # official at 16 codes
        return nn.Sequential(down(), nn.ReLU(), down())
    raise ValueError(
        f"code_len {code_len} cannot be made of {grid}x{grid} patches: use 1, 2 or 4 "
        "with 7 or 8 patches a side, or code_len = (patches a side / 2)^2 or / 4"
    )


def nearest(d, codebook):
    """d [.., Q], codebook [V, Q] -> indices of the nearest entries by squared Euclidean distance"""
    with torch.autocast(d.device.type, enabled=False):
        d, codebook = d.float(), codebook.float()
        distance = (d**2).sum(-1, keepdim=True) - 2 * d @ codebook.T + (codebook**2).sum(-1)
    return distance.argmin(-1)


class Quantizer(nn.Module):
    """NSVQ (Vali and Backstrom 2022) with a codebook that cannot stay dead.

    State: `codebook` [V, Q] and the buffer `uses` [V] of each entry since the last replacement."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.project_in = nn.Linear(c.dim, c.quant_dim)
        self.project_out = nn.Linear(c.quant_dim, c.dim)
        self.cnn = code_cnn(c.grid, c.code_len, c.quant_dim, c.code_relu)
        self.codebook = nn.Parameter(torch.randn(c.codebook_size, c.quant_dim) * c.codebook_init)
        self.register_buffer("uses", torch.zeros(c.codebook_size))

    def difference(self, first, last):
        """Patch tokens of both frames [B, N, D] -> d = cnn(last) - cnn(first), [B, K, Q]"""

        def summary(x):
            x = self.project_in(x).transpose(1, 2)  # B Q N
            return self.cnn(x.unflatten(2, (self.c.grid, self.c.grid))).flatten(2).transpose(1, 2)

        return summary(last) - summary(first)

    def substitute(self, d, indices, noise=None):
        """The NSVQ training value d + |d - c| v/|v|: gradients reach encoder and codebook."""
        noise = torch.randn_like(d) if noise is None else noise
        error = (d - self.codebook[indices]).norm(dim=-1, keepdim=True)
        return d + (error / noise.norm(dim=-1, keepdim=True) + 1e-12) * noise

    def tokens(self, values):
        """Quantised values [B, K, Q] -> action tokens for the decoder [B, K, D]"""
        if self.c.official_code_read:
            values = values.reshape(len(values), self.c.quant_dim, -1).transpose(1, 2)
        return self.project_out(values)

    @torch.no_grad()
    def count(self, d, indices, pull=0.0):
        """After a step on d [B, K, Q] and its indices [B, K], of all processes: remember every use,
        and move used entries the share `pull` of the way to the mean of what chose them (0: the
        gradient alone moves the codebook, as in the paper).  Officially a code counts once."""
        chosen = F.one_hot(indices.flatten(), len(self.uses)).to(d.dtype)  # BK V
        uses = chosen.sum(0)[:, None]
        if self.c.official_counting:
            self.uses[indices.flatten()] += 1  # a repeated index adds one only: the official bug
        else:
            self.uses += uses[:, 0]
        mean = chosen.T @ d.flatten(0, 1) / uses.clamp(min=1)
        self.codebook += pull * (uses > 0) * (mean - self.codebook)

    @torch.no_grad()
    def replace_dead(self, d, dead_below=0.1):
        """Move each entry with under `dead_below` of a fair share of the uses onto an encoder
        output of the batch d [B, K, Q], chosen with probability ~ squared distance to the live
        entries (k-means++).  Returns how many moved."""
        if self.c.official_counting:
            dead = self.uses / len(d) < dead_below
            live = self.codebook[~dead]
            if len(live):
                pick = torch.randint(len(live), (int(dead.sum()),), device=d.device)
                noise = 1e-12 * torch.randn_like(self.codebook[dead])
                self.codebook[dead] = live[pick] + noise
        else:
            now = torch.bincount(nearest(d, self.codebook).flatten(), minlength=len(self.uses))
            if (now > 0).sum() * 2 <= len(now):  # collapsed, though entries may take turns in time
                self.uses *= now > 0
            dead = self.uses < dead_below * self.uses.sum() / len(self.uses)
            points = d.flatten(0, 1).float()
            taken = self.codebook[~dead].float()
            for i in dead.nonzero().flatten().tolist():
                gap = (
                    torch.cdist(points, taken).min(dim=1).values ** 2
                    if len(taken)
                    else torch.ones(len(points), device=d.device)
                )
                far = points[torch.multinomial(gap + 1e-12, 1)]
                self.codebook[i] = far[0].to(self.codebook.dtype)
                taken = torch.cat((taken, far))
        self.uses.zero_()
        return int(dead.sum())


class LAQ(nn.Module):
    """Latent action quantizer.  Frames are float [.., 3, H, W] in [0, 1]."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.image_size % c.patch_size:
            raise ValueError(f"image_size {c.image_size}: no multiple of patch_size {c.patch_size}")
        pixels = 3 * c.patch_size**2
        self.patch_embed = nn.Sequential(
            nn.LayerNorm(pixels), nn.Linear(pixels, c.dim), nn.LayerNorm(c.dim)
        )
        self.position_bias = PositionBias(c.dim, c.heads, c.grid)
        self.spatial_encoder = Transformer(c, c.spatial_depth)
        self.temporal_encoder = Transformer(c, c.temporal_depth, over_time=True)
        self.quantizer = Quantizer(c)
        self.decoder = Transformer(c, c.decoder_depth, cross=True)
        self.to_pixels = nn.Linear(c.dim, pixels)
        self.blocks = [module for module in self.modules() if isinstance(module, Layer)]
        if c.residual:  # begin with "nothing moves"
            nn.init.zeros_(self.to_pixels.weight)
            nn.init.zeros_(self.to_pixels.bias)

    def patches(self, frames):
        """[B, T, 3, H, W] -> patch embeddings [B, T, N, D]"""
        return self.patch_embed(patchify(frames, self.config.patch_size))

    def encode(self, tokens, bias):
        """Patch embeddings [B, 2, N, D] -> pre-quantisation difference d [B, K, Q]"""
        x = self.temporal_encoder(self.spatial_encoder(tokens, bias))
        return self.quantizer.difference(x[:, 0], x[:, 1])

    def difference(self, pair):
        """pair [B, 2, 3, H, W] -> d [B, K, Q], what the codes are made of"""
        return self.encode(self.patches(pair), self.position_bias())

    def decode(self, frame, first, values, bias):
        """x_t [B, 3, H, W], its embeddings [B, 1, N, D], quantised d [B, K, Q] -> x_{t+H}"""
        context = self.quantizer.tokens(values)  # B K D
        x = self.to_pixels(self.decoder(first, bias, context))[:, 0]  # B N 3pp
        x = x.mT.contiguous().unflatten(2, (self.config.grid, -1))  # B 3pp g g
        x = F.pixel_shuffle(x, self.config.patch_size)
        return frame + x if self.config.residual else x

    def forward(self, pair, seen=None, noise=None):
        """Training pass (paper 3.1): the MSE of the future frame drawn through NSVQ.

        pair [B, 2, 3, H, W] is (x_t, x_{t+H}); `seen`, of the same shape, is what the encoder looks
        at instead (see quantize.py); noise [B, K, Q] stands in for NSVQ's own.
        -> loss (scalar), d [B, K, Q], indices [B, K]"""
        bias = self.position_bias()
        tokens = self.patches(pair)
        d = self.encode(tokens if seen is None else self.patches(seen), bias).float()
        indices = nearest(d, self.quantizer.codebook)
        value = self.quantizer.substitute(d, indices, noise)
        # The decoder must not shape the patch embedding: official code detaches here.
        predicted = self.decode(pair[:, 0], tokens[:, :1].detach(), value, bias)
        return F.mse_loss(predicted.float(), pair[:, 1]), d, indices

    @torch.no_grad()
    def label(self, pair):
        """pair [B, 2, 3, H, W] -> latent action, int64 [B, K] in [0, codebook_size)"""
        return nearest(self.difference(pair), self.quantizer.codebook)

    @torch.no_grad()
    def imagine(self, frame, codes):
        """World model: x_t [B, 3, H, W] and codes int [B, K] -> predicted x_{t+H} [B, 3, H, W]"""
        first = self.patches(frame[:, None])
        return self.decode(frame, first, self.quantizer.codebook[codes], self.position_bias())


# ------------------------------------------------------------------------ stages 2 and 3: VLA
VOCABULARIES = "text", "vision", "latent", "action"
TEXT, VISION, LATENT, ACTION = range(4)  # the vocabulary a position belongs to
END_OF_IMAGE = 8193  # in the vision vocabulary, behind an image's codes
LOW_RANK = ".down", ".up"  # how the names of what LoRA adds end (see finetune.py)


@dataclass
class VLAConfig:
    """Shape of a vision-language-action model; the defaults are LWM-Chat-1M's body (7B)."""

    dim: int = 4096
    layers: int = 32
    heads: int = 32
    mlp: int = 11008
    text_vocab: int = 32000
    vision_vocab: int = 8448  # 8192 VQGAN codes and 256 specials; 0: images as linear patches
    latent_vocab: int = 8  # codes of the LAQ; 0: no latent table and head
    action_vocab: int = 0  # 256 bins a robot action dimension; 0: no action table and head
    rope_theta: float = 5e7
    rms_eps: float = 1e-6
    rounded_rope: bool = False  # angles, cosines and sines in bf16, as official weights know them
    image_size: int = 256  # pixels, square
    patch_size: int = 16  # pixels that one code or one linear patch stands for; 0: text only

    @property
    def image_tokens(self):
        """Positions that an image fills: its patches, or its codes and END_OF_IMAGE"""
        patches = (self.image_size // self.patch_size) ** 2 if self.patch_size else 0
        return patches + bool(self.vision_vocab)


def rotate(x, cos, sin):
    """Interleaved rotary embedding: channel pairs (2i, 2i+1). x [B, heads, L, dim_head]; cos and
    sin [.., dim_head] hold each angle twice, sin first with a minus"""
    y = x.float()
    swapped = y.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (y * cos + swapped * sin).to(x.dtype)


def rope_table(angle, rounded):
    """Cosine and sine of angles; rounded: as official bf16 code makes them (docs/formats.md)"""
    stored = lambda x: x.bfloat16().float() if rounded else x
    return stored(stored(angle).cos()), stored(stored(angle).sin())


class Block(nn.Module):
    """One LLaMA layer: x += attention(norm(x)); x += w2(silu(w1 norm(x)) * w3 norm(x))"""

    def __init__(self, c):
        super().__init__()
        linear = lambda i, o: nn.Linear(i, o, bias=False)
        self.heads = c.heads
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(c.dim, c.rms_eps) for _ in range(2))
        self.wq, self.wk, self.wv, self.wo = (linear(c.dim, c.dim) for _ in range(4))
        self.w1, self.w3, self.w2 = linear(c.dim, c.mlp), linear(c.dim, c.mlp), linear(c.mlp, c.dim)
        # Keys and values of all S places, [2, B, heads, S, dim_head], while a VLA generates.
        self.register_buffer("cache", None, persistent=False)

    def forward(self, x, cos, sin, mask, at=None):
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B heads L dim_head
        y = self.attention_norm(x)
        q, k, v = (split(linear(y)) for linear in (self.wq, self.wk, self.wv))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if at is not None:
            k, v = self.cache.index_copy_(3, at, torch.stack((k, v)).to(self.cache.dtype))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.wo(y.transpose(1, 2).flatten(2))
        y = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


def smooth_positions(grid, dim):
    """Sines and cosines of a patch's place, so slow that neighbours look alike. [grid^2, dim]"""
    period = 2 * math.pi * 10 ** (-torch.arange(dim // 4) / (dim // 4))
    angle = torch.arange(grid)[:, None] / grid * period
    waves = torch.cat((angle.sin(), angle.cos()), dim=1)  # grid, dim/2
    both = torch.cat((waves.repeat(grid, 1), waves.repeat_interleave(grid, 0)), dim=1)  # of x, of y
    return (both - both.mean(0)) / both.std()


class VLA(nn.Module):
    """LLaMA over four vocabularies.  Each position is embedded and scored by its own one."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.dim % (2 * c.heads) or c.dim % 4 or c.image_size % max(1, c.patch_size):
            raise ValueError(
                f"dim {c.dim} has to divide by 4 and by 2 x heads ({c.heads}), "
                f"image_size {c.image_size} by patch_size ({c.patch_size})"
            )
        self.text_embed = nn.Embedding(c.text_vocab, c.dim)
        self.patches = c.patch_size > 0 and not c.vision_vocab
        if self.patches:
            self.patch_embed = nn.Linear(3 * c.patch_size**2, c.dim)
            self.patch_position = nn.Parameter(torch.empty(c.image_tokens, c.dim))
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.dim, c.rms_eps)
        self.text_head = nn.Linear(c.dim, c.text_vocab, bias=False)
        for name in VOCABULARIES[1:]:
            size = getattr(c, f"{name}_vocab")
            setattr(self, f"{name}_embed", nn.Embedding(size, c.dim) if size else None)
            setattr(self, f"{name}_head", nn.Linear(c.dim, size, bias=False) if size else None)
        self.apply(self.init_weights)

    def init_weights(self, module):
        """Fresh weights of one module, of the model itself last (see nn.Module.apply)"""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if module is self and self.patches:
            nn.init.normal_(self.patch_embed.weight, std=0.06)  # 0.02 takes twice as long to see
            grid = self.config.image_size // self.config.patch_size
            put(self.patch_position, smooth_positions(grid, self.config.dim))

    def parameter_groups(self, lr, head_lr, fresh, freeze_vision):
        """Optimizer groups: `fresh` tensors at head_lr x lr, others at lr or frozen (paper 3.2)"""
        if freeze_vision and self.patches:  # codes come from a VQGAN that is frozen anyway
            for p in (*self.patch_embed.parameters(), self.patch_position):
                p.requires_grad_(False)
        new = [p for name, p in self.named_parameters() if name in fresh]
        old = [p for name, p in self.named_parameters() if name not in fresh]
        return [{"params": old, "lr": lr}, {"params": new, "lr": lr * head_lr}]

    def heads(self):
        """Vocabulary -> (embedding, head) for those this model has"""
        both = {
            kind: (getattr(self, f"{name}_embed"), getattr(self, f"{name}_head"))
            for kind, name in enumerate(VOCABULARIES)
        }
        return {kind: pair for kind, pair in both.items() if pair[0] is not None}

    def embed(self, tokens, kinds, images):
        """tokens, kinds int64 [B, L]; images float [B, 3, H, W] or None -> [B, L, D]"""
        x = sum(
            table(torch.where(kinds == kind, tokens, 0)) * (kinds == kind)[..., None]
            for kind, (table, _) in self.heads().items()
        )
        if images is not None:
            patches = patchify(images, self.config.patch_size).to(self.patch_position.dtype)
            patches = (self.patch_embed(patches) + self.patch_position).to(x.dtype)
            x = x.masked_scatter((kinds == VISION)[..., None], patches)
        return x

    def tables(self, x, valid=None):
        """Of all S places cosines and sines [B or 1, 1, S, dim_head], mask [B, 1, S, S] or None.

        valid bool [B, S]: which are no padding (None: all of the embeddings x [B, S, D]).
        Position ids count valid tokens (as official)."""
        c, S, mask = self.config, (x if valid is None else valid).shape[1], None
        place = torch.arange(S, device=x.device)
        position = place[None] if valid is None else (valid.long().cumsum(1) - 1).clamp(min=0)
        if valid is not None:
            seen = (place <= place[:, None]) & valid[:, None, None, :]
            seen = seen | (place == place[:, None])  # a padding row sees itself: no NaN
            mask = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, -math.inf)
        half = torch.arange(0, c.dim // c.heads, 2, device=x.device).float()
        angle = position[:, None, :, None] * c.rope_theta ** (-half / (c.dim // c.heads))
        cos, sin = rope_table(angle, c.rounded_rope)
        return cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2), mask

    def body(self, x, tables, at=None):
        """Embeddings [B, L, D] -> final hidden states [B, L, D].

        at int64 [L]: their places among the S of `tables`, if blocks shall keep keys and values"""
        if at is not None:
            tables = [table[:, :, at] for table in tables]
        for block in self.layers:
            x = block(x, *tables, at)
        return self.norm(x)

    def forward(self, tokens, kinds, images=None, valid=None):
        """Final hidden states [B, L, D]; score them with `score`.

        tokens, kinds int64 [B, L]; images [B, 3, H, W] in [-1, 1]; valid: see `tables`"""
        x = self.embed(tokens, kinds, images)
        return self.body(x, self.tables(x, valid))

    def score(self, hidden, kind):
        """hidden [.., D] -> logits [.., V] of the vocabulary `kind`"""
        return self.heads()[kind][1](hidden)

    def answer_loss(self, hidden, rows, kind, soft=0.0):
        """Cross entropy of the answer's tokens of one vocabulary, averaged over a row's, then over
        all rows (code); a row that was cut before its answer counts as 0.  So the mean over the
        parts of a batch, on several processes or one after another, is that of the whole.

        hidden [B, L, D]; rows: tensors [B, L] targets, target_kinds, mask (see data.Sequences);
        soft: width in bins of a Gaussian around the true token (0: one-hot), one for all tokens of
        an answer or a list of one for each.  -> loss, accuracy"""
        chosen = rows["mask"] & (rows["target_kinds"] == kind)
        row = chosen.nonzero()[:, 0]
        logits, target = self.score(hidden[chosen], kind).float(), rows["targets"][chosen]
        gap = torch.arange(logits.shape[-1], device=target.device) - target[:, None]
        if isinstance(soft, list):
            place = (chosen.cumsum(1) - 1)[chosen]  # of each token in its answer
            width = torch.tensor(soft, device=target.device)[place, None].clamp(min=1e-3)
            wanted = torch.softmax(-0.5 * (gap / width) ** 2, dim=-1)
        else:
            wanted = torch.softmax(-0.5 * (gap / soft) ** 2, dim=-1) if soft else target
        losses = F.cross_entropy(logits, wanted, reduction="none")
        count = torch.bincount(row, minlength=len(hidden))
        right = (logits.argmax(-1) == target).float().sum() / max(1, len(target))
        return (losses / count[row]).sum() / len(hidden), right

    @torch.no_grad()
    def adopt(self, weights, tags=None):
        """Take over another model's tensors by name; latent and action tables and heads that it
        does not have stay fresh, those this model lacks are dropped.  -> fresh names

        tags: vocabulary -> its opening tag's token.  When given, fresh input tables begin where the
        body can already read: as their tag, or actions as latent actions, tag and all."""
        own = ("vision_", "latent_", "action_")
        fresh = [
            n
            for n in self.state_dict()
            if n not in weights and (n.startswith(own) or n.endswith(LOW_RANK))
        ]
        shed = [n for n in weights if n.startswith(own) and n not in self.state_dict()]
        load_strictly(self, {n: w for n, w in weights.items() if n not in shed}, fresh)
        for kind, name in ((LATENT, "latent_embed.weight"), (ACTION, "action_embed.weight")):
            if tags and name in fresh:
                text, table = whole(self.text_embed.weight).clone(), self.get_parameter(name)
                row = text[tags[kind]].clone()
                if "latent_embed.weight" in shed:
                    text[tags[kind]] = text[tags[LATENT]]
                    row = weights["latent_embed.weight"][:].mean(0)
                put(self.text_embed.weight, text)
                put(table, row.expand(table.shape))
        return fresh

    def decode(self, x, tables, at, kind):
        """The token behind the last of the embeddings x at the places `at` (see body), [B, 1]"""
        return self.score(self.body(x, tables, at)[:, -1], kind).argmax(-1, keepdim=True)

    def compile_decode(self):
        """For control loops: CUDA graphs on GPUs, else C++ (fused where a product has one row)"""
        on_cpu = {"cpp_wrapper": True, "post_grad_fusion_options": {"decompose_mm_pass": {}}}
        options = {"triton.cudagraphs": True} if self.norm.weight.is_cuda else on_cpu
        self.decode = torch.compile(self.decode, dynamic=False, options=options)

    @torch.inference_mode()
    def generate(self, tokens, kinds, images, valid, kind, count, official_eos=False):
        """Greedy continuation of left-padded prompts by `count` tokens of one vocabulary.

        tokens, kinds int64 [B, L], valid bool [B, L], images [B, 3, H, W] or None -> int64
        [B, count].  official_eos: 0 behind a token 2, which officially ends even latent codes."""
        c, (B, L) = self.config, tokens.shape
        shape = 2, B, c.heads, L + count, c.dim // c.heads
        for block in self.layers:  # tensors that stay: CUDA graphs remember where they are
            if block.cache is None or block.cache.shape != shape:
                block.cache = self.norm.weight.new_zeros(shape)
        x, answer = self.embed(tokens, kinds, images), []
        tables = self.tables(x, F.pad(valid, (0, count), value=True))
        at = torch.arange(L, device=tokens.device)
        for _ in range(count):
            answer.append(self.decode(x, tables, at, kind).clone())  # CUDA graphs reuse outputs
            x, at = self.heads()[kind][0](answer[-1]), at[-1:] + 1
        answer = torch.cat(answer, dim=1)
        if official_eos:
            answer = answer * ((answer == 2).cumsum(1) - (answer == 2).long() == 0)
        return answer


def build_vla(config):
    """A VLA; from some 1e9 parameters on without memory, which Processes.shard then gives it"""
    large = 12 * config.layers * config.dim**2 > 1e9
    with torch.device("meta" if large else "cpu"):
        return VLA(config)
