"""Stages 2 and 3: the vision-language-action model (paper 3.2, 3.3).  Letters: see __init__.py"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import fill, full_tensor, load_strictly, option, patchify

VOCABULARIES = "text", "vision", "latent", "action"
TEXT, VISION, LATENT, ACTION = range(4)  # the vocabulary a position belongs to
END_OF_IMAGE = 8193  # in the vision vocabulary, after an image's codes
LOW_RANK = ".down", ".up"  # how the names of what LoRA adds end (see finetune.py)


@dataclass
class VLAConfig:
    """Shape of a vision-language-action model; the defaults are LWM-Chat-1M's body (7B)."""

    dim: int = option(4096, "width")
    layers: int = option(32, "blocks")
    heads: int = option(32, "attention heads")
    mlp: int = option(11008, "width inside the feed-forward part of a block")
    text_vocab: int = option(32000, "tokens of the tokenizer")
    vision_vocab: int = option(
        8448, "8192 VQGAN codes and 256 specials; 0: images as linear patches", least=0
    )
    latent_vocab: int = option(8, "codes of the LAQ; 0: no latent table and head", least=0)
    action_vocab: int = option(
        0, "256 bins per robot action dimension; 0: no action table and head", least=0
    )
    rope_theta: float = option(5e7, "base of the rotary embedding's wavelengths")
    rms_eps: float = option(1e-6, "added to the mean square in RMSNorm")
    rounded_rope: bool = option(
        False, "angles, cosines and sines in bf16, as the official weights were trained"
    )
    image_size: int = option(256, "pixels, square")
    patch_size: int = option(
        16, "pixels that one code or one linear patch stands for; 0: text only", least=0
    )

    @property
    def dim_head(self) -> int:
        return self.dim // self.heads

    @property
    def image_tokens(self) -> int:
        """Positions that an image fills: its patches, or its codes and END_OF_IMAGE"""
        patches = (self.image_size // self.patch_size) ** 2 if self.patch_size else 0
        return patches + bool(self.vision_vocab)


def positions(valid: Tensor) -> Tensor:
    """bool [B, S] -> int64 [B, S], the number of valid tokens before each one (official; 0 in
    padding on the left)"""
    return (valid.long().cumsum(1) - 1).clamp(min=0)


def causal_mask(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """valid bool [B, S] -> [B, 1, S, S], added to logits: 0 where a position may look, else -inf.

    Each position sees the valid ones before it, and itself: padding that saw nothing would be
    NaN."""
    position = torch.arange(valid.shape[1], device=valid.device)
    visible = (position <= position[:, None]) & valid[:, None, None, :]  # B 1 S S
    visible = visible | (position == position[:, None])
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, -math.inf)


def rope_table(angle: Tensor, rounded: bool) -> tuple[Tensor, Tensor]:
    """Cosine and sine of angles; rounded: as official bf16 code makes them (docs/formats.md)"""

    def stored(x: Tensor) -> Tensor:
        return x.bfloat16().float() if rounded else x

    angle = stored(angle)
    return stored(angle.cos()), stored(angle.sin())


def rope(position: Tensor, c: VLAConfig) -> tuple[Tensor, Tensor]:
    """position int64 [B, S] -> cosines and sines [B, 1, S, dim_head] for `rotate`: cos, cos and
    -sin, sin for each pair of channels"""
    channel = torch.arange(0, c.dim_head, 2, device=position.device).float()  # dim_head/2
    frequency = c.rope_theta ** (-channel / c.dim_head)
    angle = position[:, None, :, None] * frequency  # B 1 S dim_head/2
    cos, sin = rope_table(angle, c.rounded_rope)  # B 1 S dim_head/2
    return cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rotary embedding: channel pairs (2i, 2i+1) turn by an angle (official; Hugging
    Face pairs i with i + dim_head/2).  x [B, heads, L, dim_head]; cos, sin: see `rope`"""
    y = x.float()
    swapped = y.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (y * cos + swapped * sin).to(x.dtype)


class KVCache(nn.Module):
    """Keys and values of one block in S slots, one per position: [B, heads, S, dim_head] each.

    Its shape is fixed and it is written in place: a CUDA graph remembers the address of a module's
    buffers.  They follow the model to a device or precision and are in no state dict."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        super().__init__()
        self.register_buffer("keys", like.new_zeros(shape), persistent=False)
        self.register_buffer("values", like.new_zeros(shape), persistent=False)

    def update(self, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, heads, L, dim_head] in the slots int64 [L] -> all S of both"""
        self.keys.index_copy_(2, slots, k.to(self.keys.dtype))
        self.values.index_copy_(2, slots, v.to(self.values.dtype))
        return self.keys, self.values


class Block(nn.Module):
    """One LLaMA layer: x += attention(norm(x)); x += w2(silu(w1 norm(x)) * w3 norm(x))"""

    def __init__(self, c: VLAConfig) -> None:
        super().__init__()

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        self.heads = c.heads
        self.attention_norm = nn.RMSNorm(c.dim, c.rms_eps)
        self.ffn_norm = nn.RMSNorm(c.dim, c.rms_eps)
        self.wq = linear(c.dim, c.dim)
        self.wk = linear(c.dim, c.dim)
        self.wv = linear(c.dim, c.dim)
        self.wo = linear(c.dim, c.dim)
        self.w1 = linear(c.dim, c.mlp)
        self.w3 = linear(c.dim, c.mlp)
        self.w2 = linear(c.mlp, c.dim)
        self.register_module("cache", None)  # a KVCache once the VLA has generated

    def split(self, y: Tensor) -> Tensor:
        """[B, L, D] -> [B, heads, L, dim_head]"""
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """x [B, L, D], cos and sin [B or 1, 1, L, dim_head] -> [B, L, D].

        In training: mask [B, 1, L, L], or None for a causal one.  In generation, slots int64 [L]:
        x is in these slots of the cache, and looks at all S of them through mask [B, 1, L, S]"""
        y = self.attention_norm(x)  # B L D
        q = rotate(self.split(self.wq(y)), cos, sin)  # B heads L dim_head
        k = rotate(self.split(self.wk(y)), cos, sin)
        v = self.split(self.wv(y))
        if slots is not None:
            k, v = self.cache.update(slots, k, v)  # the KV cache is filled here; B heads S dim_head
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.wo(y.transpose(1, 2).flatten(2))  # B L D
        y = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


def smooth_positions(grid: int, dim: int) -> Tensor:
    """Sines and cosines of a patch's row and column, so slow that neighbors look alike.
    [grid^2, dim]"""
    frequency = 2 * math.pi * 10 ** (-torch.arange(dim // 4) / (dim // 4))  # dim/4
    angle = torch.arange(grid)[:, None] / grid * frequency  # grid dim/4
    waves = torch.cat((angle.sin(), angle.cos()), dim=1)  # grid dim/2
    both = torch.cat((waves.repeat(grid, 1), waves.repeat_interleave(grid, 0)), dim=1)  # of x, of y
    return (both - both.mean(0)) / both.std()


def soft_targets(target: Tensor, size: int, width: float | Tensor) -> Tensor:
    """Tokens int64 [n] -> probabilities [n, size], a Gaussian over the tokens around each: of one
    width, or of one for each, [n, 1]"""
    gap = torch.arange(size, device=target.device) - target[:, None]  # n size
    return torch.softmax(-0.5 * (gap / width) ** 2, dim=-1)


def zero_after_end(answer: Tensor) -> Tensor:
    """What official generation makes of tokens [B, n]: 0 after a token 2, the end of text, which
    officially ends latent codes too (docs/deviations.md, 15)"""
    end = answer == 2
    return answer * (end.cumsum(1) - end.long() == 0)


class VLA(nn.Module):
    """LLaMA over four vocabularies.  Each position is embedded and scored by its own.

    Raises ValueError for sizes that do not divide."""

    def __init__(self, config: VLAConfig) -> None:
        super().__init__()
        c = self.config = config
        if c.dim % (2 * c.heads) or c.dim % 4 or c.image_size % max(1, c.patch_size):
            raise ValueError(
                f"dim {c.dim} must be divisible by 4 and 2x heads ({c.heads}), "
                f"image_size {c.image_size} by patch_size ({c.patch_size})"
            )
        self.text_embed = nn.Embedding(c.text_vocab, c.dim)
        self.reads_patches = c.patch_size > 0 and not c.vision_vocab
        if self.reads_patches:
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

    def init_weights(self, module: nn.Module) -> None:
        """Fresh weights of one module, of the model itself last (see nn.Module.apply):

        tables, heads, wq wk wv wo, w1 w2 w3   N(0, 0.02^2)
        biases                                 0
        RMSNorm                                1
        LoRA                                   see LowRank in finetune.py
        patch_embed.weight                     N(0, 0.06^2): with 0.02, twice as slow to learn
        patch_position                         `smooth_positions`"""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if module is self and self.reads_patches:
            nn.init.normal_(self.patch_embed.weight, std=0.06)
            grid = self.config.image_size // self.config.patch_size
            fill(self.patch_position, smooth_positions(grid, self.config.dim))

    @torch.no_grad()
    def load_pretrained(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Copy another VLA's weights (name -> tensor or safetensors slice) -> names of the tensors
        that stay fresh.

        Tables and heads for vision, latent actions and robot actions may differ: those that only
        this model has stay fresh, as do LoRA's tensors; those that only the other has are dropped.
        Everything else must agree (see load_strictly)."""
        own = tuple(f"{name}_" for name in VOCABULARIES[1:])
        state = self.state_dict()
        fresh = [
            name
            for name in state
            if name not in weights and (name.startswith(own) or name.endswith(LOW_RANK))
        ]
        kept = {
            name: tensor
            for name, tensor in weights.items()
            if name in state or not name.startswith(own)
        }
        load_strictly(self, kept, fresh)
        return fresh

    @torch.no_grad()
    def start_from_tags(
        self, weights: Mapping[str, Tensor], fresh: Collection[str], tags: Mapping[int, int]
    ) -> None:
        """Begin fresh input tables with what the body can already read (docs/deviations.md, 8).

        Each row of a table begins as the text embedding of its vocabulary's opening tag.  Robot
        actions that take the place of latent actions begin as the mean latent action instead, and
        their tag as the latent one.

        weights, fresh: argument and result of load_pretrained; tags: LATENT and ACTION -> token"""
        text = full_tensor(self.text_embed.weight).clone()  # V D
        if "latent_embed.weight" in fresh:
            self.fill_rows(self.latent_embed, text[tags[LATENT]])
        if "action_embed.weight" in fresh:
            row = text[tags[ACTION]].clone()
            if "latent_embed.weight" in weights and self.latent_embed is None:
                row = weights["latent_embed.weight"][:].mean(0)
                text[tags[ACTION]] = text[tags[LATENT]]
                fill(self.text_embed.weight, text)
            self.fill_rows(self.action_embed, row)

    def fill_rows(self, table: nn.Embedding, row: Tensor) -> None:
        """Begin every row [D] of a table alike"""
        fill(table.weight, row.expand(table.weight.shape))

    def freeze_vision(self) -> None:
        """Keep the embedding of linear patches as it is (paper 3.2).  A model that reads codes has
        none: its VQGAN is outside the model, and its table of codes is trained."""
        if self.reads_patches:
            for parameter in (*self.patch_embed.parameters(), self.patch_position):
                parameter.requires_grad_(False)

    def parameter_groups(self, lr: float, head_lr: float, fresh: Collection[str]) -> list[dict]:
        """Optimizer groups: the tensors named in `fresh` at head_lr x lr, the others at lr"""
        new = [p for name, p in self.named_parameters() if name in fresh]
        old = [p for name, p in self.named_parameters() if name not in fresh]
        return [{"params": old, "lr": lr}, {"params": new, "lr": lr * head_lr}]

    def vocabularies(self) -> dict[int, tuple[nn.Embedding, nn.Linear]]:
        """Vocabulary -> (table, head) for those this model has"""
        both = {
            kind: (getattr(self, f"{name}_embed"), getattr(self, f"{name}_head"))
            for kind, name in enumerate(VOCABULARIES)
        }
        return {kind: pair for kind, pair in both.items() if pair[0] is not None}

    def embed(self, tokens: Tensor, kinds: Tensor, images: Tensor | None) -> Tensor:
        """tokens, kinds int64 [B, L]; images float [B, 3, H, W] or None -> [B, L, D]"""
        # Every table reads all positions, 0 where they are not its own, and only its own count.
        x = sum(
            table(torch.where(kinds == kind, tokens, 0)) * (kinds == kind)[..., None]
            for kind, (table, _) in self.vocabularies().items()
        )
        if images is not None:
            patches = patchify(images, self.config.patch_size).to(self.patch_position.dtype)
            patches = (self.patch_embed(patches) + self.patch_position).to(x.dtype)  # B N D
            x = x.masked_scatter((kinds == VISION)[..., None], patches)
        return x

    def attention_inputs(
        self, x: Tensor, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """-> what attention needs besides the embeddings: cos and sin [B or 1, 1, S, dim_head], and
        a mask [B, 1, S, S], or None for a causal one.

        x [B, L, D] are the embeddings; valid bool [B, S]: which positions are not padding, also of
        tokens to come (None: all L are valid, S = L)"""
        if valid is None:
            cos, sin = rope(torch.arange(x.shape[1], device=x.device)[None], self.config)
            return cos, sin, None
        cos, sin = rope(positions(valid), self.config)
        return cos, sin, causal_mask(valid, x.dtype)

    def body(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, slots: Tensor | None = None
    ) -> Tensor:
        """Embeddings [B, L, D] -> final hidden states [B, L, D]; the rest: see Block"""
        for block in self.layers:
            x = block(x, cos, sin, mask, slots)
        return self.norm(x)

    def forward(
        self,
        tokens: Tensor,
        kinds: Tensor,
        images: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [B, L, D]; score them with `score`.

        tokens, kinds int64 [B, L]; images [B, 3, H, W] in [-1, 1]; valid: see attention_inputs"""
        x = self.embed(tokens, kinds, images)  # B L D
        return self.body(x, *self.attention_inputs(x, valid))

    def score(self, hidden: Tensor, kind: int) -> Tensor:
        """hidden [.., D] -> logits [.., V] of the vocabulary `kind`"""
        _, head = self.vocabularies()[kind]
        return head(hidden)

    def answer_loss(
        self,
        hidden: Tensor,
        rows: Mapping[str, Tensor],
        kind: int,
        soft: float | list[float] = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy of the answer's tokens of one vocabulary, averaged over a row's, then over
        all rows (code); a row that was cut before its answer counts as 0.  So the mean over the
        parts of a batch, on several processes or one after another, is that of the whole.

        hidden [B, L, D]; rows: tensors [B, L] targets, target_kinds, mask (see sequences.py);
        soft: width of `soft_targets` in bins (0: one-hot), one for all tokens of an answer or a
        list of one for each.  -> loss, accuracy (scalars)"""
        chosen = rows["mask"] & (rows["target_kinds"] == kind)  # B L, n of them true
        logits = self.score(hidden[chosen], kind).float()  # n V
        target = rows["targets"][chosen]  # n
        wanted = target
        if isinstance(soft, list):
            in_answer = (chosen.cumsum(1) - 1)[chosen]  # n, each token's index in its answer
            width = torch.tensor(soft, device=target.device)[in_answer, None]  # n 1
            width = width.clamp(min=1e-3)  # 0, a single right token, without a division by 0
            wanted = soft_targets(target, logits.shape[-1], width)
        elif soft:
            wanted = soft_targets(target, logits.shape[-1], soft)
        losses = F.cross_entropy(logits, wanted, reduction="none")  # n
        row = chosen.nonzero()[:, 0]  # n
        count = torch.bincount(row, minlength=len(hidden))  # B
        correct = (logits.argmax(-1) == target).float().sum() / max(1, len(target))
        return (losses / count[row]).sum() / len(hidden), correct

    # ---------------------------------------------------------------- generation
    @torch.inference_mode()
    def generate(
        self,
        tokens: Tensor,
        kinds: Tensor,
        images: Tensor | None,
        valid: Tensor,
        kind: int,
        count: int,
        official_eos: bool = False,
    ) -> Tensor:
        """Greedy continuation of left-padded prompts by `count` tokens of one vocabulary.

        tokens, kinds int64 [B, L], valid bool [B, L], images [B, 3, H, W] or None -> int64
        [B, count].  official_eos: see zero_after_end"""
        B, L = tokens.shape
        self.reserve_cache(B, L + count)
        x = self.embed(tokens, kinds, images)  # B L D
        valid = F.pad(valid, (0, count), value=True)  # B S, S = L + count
        inputs = self.attention_inputs(x, valid)
        token = self.prefill(x, *inputs, kind).clone()  # B 1; a CUDA graph reuses its output
        answer = [token]
        slots = torch.arange(L, L + 1, device=tokens.device)  # 1, the slot of the next token
        for _ in range(count - 1):
            token = self.decode_one_token(token, slots, *inputs, kind).clone()  # B 1
            answer.append(token)
            slots = slots + 1
        answer = torch.cat(answer, dim=1)  # B count
        return zero_after_end(answer) if official_eos else answer

    def reserve_cache(self, batch: int, slots: int) -> None:
        """A KVCache in each block; one of the right shape stays where it is, whatever it holds"""
        shape = batch, self.config.heads, slots, self.config.dim_head
        for block in self.layers:
            if block.cache is None or block.cache.keys.shape != shape:
                block.cache = KVCache(shape, self.norm.weight)

    def prefill(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, kind: int) -> Tensor:
        """A prompt's embeddings [B, L, D] -> the token after it, int64 [B, 1].  Fills the first L
        of the S slots of the cache; cos, sin, mask: see attention_inputs"""
        slots = torch.arange(x.shape[1], device=x.device)
        return self.next_token(x, slots, cos, sin, mask, kind)

    def decode_one_token(
        self, token: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, kind: int
    ) -> Tensor:
        """The token int64 [B, 1] in the slot int64 [1] -> the one after it, int64 [B, 1]"""
        table, _ = self.vocabularies()[kind]
        return self.next_token(table(token), slots, cos, sin, mask, kind)

    def next_token(
        self, x: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, kind: int
    ) -> Tensor:
        """Embeddings [B, L, D] in the slots int64 [L] -> the token after the last, [B, 1]"""
        hidden = self.body(x, cos[:, :, slots], sin[:, :, slots], mask[:, :, slots], slots)  # B L D
        return self.score(hidden[:, -1], kind).argmax(-1, keepdim=True)

    def compile_decode(self) -> None:
        """For control loops: CUDA graphs on GPUs, else C++ (fused where a product has one row)"""
        on_cpu = {"cpp_wrapper": True, "post_grad_fusion_options": {"decompose_mm_pass": {}}}
        options = {"triton.cudagraphs": True} if self.norm.weight.is_cuda else on_cpu
        self.prefill = torch.compile(self.prefill, dynamic=False, options=options)
        self.decode_one_token = torch.compile(self.decode_one_token, dynamic=False, options=options)


def build_vla(config: VLAConfig) -> VLA:
    """A VLA; from some 1e9 parameters on without memory, which training.place then gives it"""
    large = 12 * config.layers * config.dim**2 > 1e9
    with torch.device("meta" if large else "cpu"):
        return VLA(config)
