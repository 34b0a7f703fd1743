"""Official VLAs: `params` streams (LWM-Chat-1M, LAPA-7B), and Hugging Face's layout both ways."""

import json
from functools import partial
from pathlib import Path

from torch import Tensor

import common
from model import VLA, VLAConfig
from official.msgpack_stream import read_stream, read_tensor
from official.tensors import (
    Counterpart,
    Readers,
    Shape,
    Source,
    Stored,
    as_stored,
    count_numbers,
    match,
    open_safetensors,
    read_size,
    rename,
)

HEAD_WIDTH = 128  # channels per attention head of LWM, where a file does not say


def number_of_heads(heads: int, dim: int) -> int:
    """`heads`, or for 0 as many as LWM has at this width.  Raises ValueError if they do not fit"""
    heads = heads or dim // HEAD_WIDTH
    if not heads or dim % heads:
        raise ValueError(f"width {dim} does not divide into {heads} heads: pass --heads")
    return heads


# ------------------------------------------------------------------------ the params stream
STREAM_NAMES = (  # ours -> official
    (r"^text_embed\.weight", "transformer/wte/embedding"),
    (r"^vision_embed\.weight", "transformer/vte/embedding"),
    (r"^latent_embed\.weight", "transformer/dte/embedding"),
    (r"^action_embed\.weight", "transformer/ate/embedding"),
    (r"^text_head", "lm_head"),
    (r"^latent_head", "delta_head"),
    (r"^norm\.", "transformer/ln_f/"),
    (r"^layers\.(\d+)\.", r"transformer/h/\1/"),
    (r"(w[qkvo])\.", r"attention/\1/"),
    (r"(w[123])\.", r"feed_forward/\1/"),
    (r"[./]weight$", "/kernel"),
)
SCANNED = "transformer/h/scan_decoder/"  # all layers in one tensor, whose first axis counts them


def stream_counterpart(name: str, shape: Shape, scanned_layers: int = 0) -> Counterpart:
    """Our VLA's tensor in a params stream, where kernels are (in, out).

    scanned_layers: how many layers share a tensor, 0 if each has tensors of its own"""
    official = rename(name, STREAM_NAMES)
    layer = None
    arrange = as_stored
    if official.endswith("kernel") and len(shape) == 2:
        shape = shape[::-1]
        arrange = Tensor.t
    if scanned_layers and name.startswith("layers."):
        number = name.split(".")[1]
        official = official.replace(f"transformer/h/{number}/", SCANNED)
        shape = (scanned_layers, *shape)
        layer = int(number)
    return Counterpart(official, shape, arrange, layer)


def read_vocabulary(source: Source, embedding: str, head: str) -> int:
    """Tokens of a vocabulary that a model may lack (0): embedding (V, D), head (D, V)"""
    names = f"transformer/{embedding}/embedding", f"{head}/kernel"
    if not any(name in source for name in names):
        return 0
    return read_size(source, (names[0], 0), (names[1], 1))


def from_stream(
    path: Path,
    heads: int = 0,
    rope_theta: float = 5e7,
    rounded_rope: bool = True,
    image_size: int = 0,
) -> tuple[VLAConfig, Readers]:
    """A params file -> its VLA's shape, and its tensors.  heads 0: width / 128; image_size 0: 256

    Raises ValueError that names the tensors which are missing, unexpected or misshapen."""
    source = {
        name: Stored(tensor.shape, partial(read_tensor, path, tensor))
        for name, tensor in read_stream(path).items()
    }
    scanned_layers = 0
    layer = "transformer/h/0/"
    if any(name.startswith(SCANNED) for name in source):
        layer = SCANNED
        scanned_layers = read_size(
            source,
            (f"{layer}attention/wq/kernel", 0),
            (f"{layer}feed_forward/w1/kernel", 0),
            (f"{layer}ffn_norm/kernel", 0),
        )
    dim = read_size(
        source,
        ("transformer/wte/embedding", 1),
        ("transformer/ln_f/kernel", 0),
        ("lm_head/kernel", 0),
    )
    config = VLAConfig(
        dim=dim,
        layers=scanned_layers or count_numbers(source, r"transformer/h/(\d+)/"),
        heads=number_of_heads(heads, dim),
        mlp=read_size(
            source,
            (f"{layer}feed_forward/w1/kernel", -1),
            (f"{layer}feed_forward/w3/kernel", -1),
            (f"{layer}feed_forward/w2/kernel", -2),
        ),
        text_vocab=read_size(source, ("transformer/wte/embedding", 0), ("lm_head/kernel", 1)),
        vision_vocab=read_size(source, ("transformer/vte/embedding", 0), ("vision_head/kernel", 1)),
        latent_vocab=read_vocabulary(source, "dte", "delta_head"),
        action_vocab=read_vocabulary(source, "ate", "action_head"),
        rope_theta=rope_theta,
        rounded_rope=rounded_rope,
        image_size=image_size or 256,
    )
    counterpart = partial(stream_counterpart, scanned_layers=scanned_layers)
    return config, match(VLA, config, source, counterpart)


# ------------------------------------------------------------------------ Hugging Face's layout
HUGGING_NAMES = (  # ours -> Hugging Face's
    (r"^text_embed", "model.embed_tokens"),
    (r"^text_head", "lm_head"),
    (r"^norm", "model.norm"),
    (r"^layers", "model.layers"),
    (r"\.w([qkvo])\.", r".self_attn.\1_proj."),
    (r"\.w1\.", ".mlp.gate_proj."),
    (r"\.w2\.", ".mlp.down_proj."),
    (r"\.w3\.", ".mlp.up_proj."),
    (r"attention_norm", "input_layernorm"),
    (r"ffn_norm", "post_attention_layernorm"),
)
HUGGING_SETTINGS = {  # ours -> Hugging Face's
    "text_vocab": "vocab_size",
    "dim": "hidden_size",
    "mlp": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "rms_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
ROTATED = "wq.weight", "wk.weight"  # whose rows come in rotary pairs


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k, per head: pairs (0, 1), (2, 3), .. -> evens, then odds (Hugging Face's)"""
    pairs = weight.unflatten(0, (heads, -1, 2))  # heads dim_head/2 2 D
    return pairs.transpose(1, 2).flatten(0, 2)


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k, per head: evens, then odds (Hugging Face's) -> pairs (0, 1), (2, 3), .."""
    halves = weight.unflatten(0, (heads, 2, -1))  # heads 2 dim_head/2 D
    return halves.transpose(1, 2).flatten(0, 2)


def hugging_counterpart(name: str, shape: Shape, heads: int) -> Counterpart:
    """Our VLA's tensor in Hugging Face's layout"""
    arrange = partial(to_pairs, heads=heads) if name.endswith(ROTATED) else as_stored
    return Counterpart(rename(name, HUGGING_NAMES), shape, arrange)


def read_settings(path: Path) -> dict[str, float]:
    """What config.json of a folder in Hugging Face's layout says of heads, rms_eps, rope_theta"""
    file = path / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings |= settings.get("rope_parameters") or {}  # since transformers 5
    return {
        ours: settings[HUGGING_SETTINGS[ours]]
        for ours in ("heads", "rms_eps", "rope_theta")
        if HUGGING_SETTINGS[ours] in settings
    }


def from_hugging(
    path: Path, heads: int = 0, rope_theta: float = 5e7, image_size: int = 0
) -> tuple[VLAConfig, Readers]:
    """A folder or file in Hugging Face's layout (LWM-Text) -> a VLA of text alone: its shape, and
    its tensors.  config.json overrides rope_theta, and `heads` overrides config.json.

    Raises ValueError that names the tensors which are missing, unexpected or misshapen."""
    source = {
        name: stored
        for name, stored in open_safetensors(path).items()
        if not name.endswith("rotary_emb.inv_freq")  # a buffer of old exports
    }
    known = read_settings(path)
    mlp = "model.layers.0.mlp."
    dim = read_size(
        source,
        ("model.embed_tokens.weight", 1),
        ("model.norm.weight", 0),
        ("lm_head.weight", 1),
    )
    shape = {
        "rope_theta": rope_theta,
        **known,
        "dim": dim,
        "layers": count_numbers(source, r"model\.layers\.(\d+)\."),
        "heads": number_of_heads(heads or known.get("heads", 0), dim),
        "mlp": read_size(
            source,
            (f"{mlp}gate_proj.weight", 0),
            (f"{mlp}up_proj.weight", 0),
            (f"{mlp}down_proj.weight", 1),
        ),
        "text_vocab": read_size(source, ("model.embed_tokens.weight", 0), ("lm_head.weight", 0)),
    }
    config = VLAConfig(
        **shape, vision_vocab=0, latent_vocab=0, patch_size=0, image_size=image_size or 256
    )
    counterpart = partial(hugging_counterpart, heads=config.heads)
    return config, match(VLA, config, source, counterpart)


def to_hugging(folder: Path) -> tuple[Readers, dict[str, object], dict[str, Path]]:
    """The text part of a VLA's checkpoint for transformers.LlamaForCausalLM -> tensors with Hugging
    Face's names, the content of config.json, and files to put beside it"""
    folder, meta = common.open_checkpoint(folder, "source", ("pretrain", "finetune"))
    config = VLAConfig(**meta["model"])
    tensors = []
    for name, stored in open_safetensors(folder).items():
        if name.startswith(("text_", "layers.", "norm.")):
            tensors.append(
                (rename(name, HUGGING_NAMES), partial(read_halves, stored, name, config.heads))
            )
    settings = {theirs: getattr(config, ours) for ours, theirs in HUGGING_SETTINGS.items()}
    settings |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_key_value_heads": config.heads,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return tensors, settings, {file.name: file for file in folder.glob("tokenizer.json")}


def read_halves(stored: Stored, name: str, heads: int) -> Tensor:
    """Our VLA's tensor as Hugging Face's layout has it"""
    tensor = stored.read()
    return to_halves(tensor, heads) if name.endswith(ROTATED) else tensor
