"""Official files -> checkpoints that every stage here reads, and back to Hugging Face's layout.

    python -m official.convert params vqgan tokenizer.model lwm/       LWM-Chat-1M or LAPA-7B (JAX)
    python -m official.convert laq_openx.pt laq/ --code_len 4          LAPA's latent action quantizer
    python -m official.convert LWM-Text-Chat-1M/ text/                 a text model in Hugging Face's layout
    python -m official.convert lapa/ hf/ --to hf                       the text part of a VLA, the other way

Names and shapes are compared strictly before anything is written; tensors are then copied one by
one, in their own precision, into safetensors files of up to 2 GB beside a config.json, in which the
official quirks that numbers depend on are switched on."""

import json
import math
import pickle
import re
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mode, multimode

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, normalizers
from tqdm import tqdm

import common
from model import LAQ, VLA, VOCABULARIES, LAQConfig, VLAConfig, differences
from official.vqgan import VQGAN, VQGANConfig
from sequences import OFFICIAL_TEMPLATE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ConvertConfig:
    source: list  # official files: params, vqgan, *.model, *.pt, *.csv, *.safetensors or a folder
    out: str  # folder to write
    to: str = ""  # hf: write the text part of a VLA checkpoint in Hugging Face's layout
    heads: int = 0  # of a VLA whose files do not tell; 0: width / 128
    rope_theta: float = 5e7  # of a VLA whose files do not tell
    rounded_rope: bool = True  # of a params stream: rotary tables as in official bf16 training
    image_size: int = 0  # pixels; 0: 256, or of a LAQ what its number of codes needs
    code_len: int = 0  # of a LAQ whose file fits several numbers of codes; 0: the file tells
    window: float = 0.6  # LAQ: seconds between the frames it was trained on (not in the file)


def rename(name, table):
    for pattern, theirs in table:
        name = re.sub(pattern, theirs, name)
    return name


def matched(kind, config, source, official):
    """Strictly pair the tensors of a model with a source of weights -> (name, read) pairs.

    source: their name -> (shape, read), read() -> tensor; official(name, shape) -> their name,
    their shape, and take(read) -> the tensor in our form.  Raises ValueError in their names."""
    with torch.device("meta"):
        tensors = kind(config).state_dict()
    table = {name: official(name, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if problems := differences(
        {theirs: shape for theirs, shape, _ in table.values()},
        {theirs: shape for theirs, (shape, _) in source.items()},
    ):
        raise ValueError(problems)
    return [(name, partial(take, source[theirs][1])) for name, (theirs, _, take) in table.items()]


def sizes(kind, config, source, official, marks, optional=()):
    """{field: mark} -> {field: size}, read off a source.  The axes that in a model of `config` are
    as long as a mark, and no others, tell the size of its field.  A wrong one is outvoted by the
    others, and then refused by `matched`; an `optional` size that none tells is 0."""
    with torch.device("meta"):
        parameters = kind(config).named_parameters()
    shapes = [official(name, tuple(p.shape))[:2] for name, p in parameters]
    found = {}
    for field, mark in marks.items():
        places = [
            (name, axis)
            for name, shape in shapes
            for axis, size in enumerate(shape)
            if size == mark
        ]
        names = " and ".join(dict.fromkeys(name for name, _ in places))
        winners = multimode(
            source[name][0][axis] for name, axis in places if axis < len(source.get(name, ((),))[0])
        )
        if not winners and field not in optional:
            raise ValueError(f"missing: {names}")
        if len(winners) > 1:
            raise ValueError(f"wrong shape: {names} disagree: {' or '.join(map(str, winners))}")
        found[field] = winners[0] if winners else 0
    return found


def count(source, pattern):
    """How many different numbers the group of `pattern` takes at the start of their names"""
    return len({m[1] for m in map(re.compile(pattern).match, source) if m})


# ------------------------------------------------------------------------ VLA: the params stream
STREAM_KEYS = (  # ours -> official
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
HUGGING_KEYS = (  # ours -> Hugging Face's
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

NUMBER_BYTES = {
    0xC4: 1,
    0xC5: 2,
    0xC6: 4,
    0xC7: 1,
    0xC8: 2,
    0xC9: 4,
    0xD9: 1,
    0xDA: 2,
    0xDB: 4,
    0xCC: 1,
    0xCD: 2,
    0xCE: 4,
    0xCF: 8,
    0xDC: 2,
    0xDD: 4,
    0xDE: 2,
    0xDF: 4,
}


def take(file, count):
    block = file.read(count)
    if len(block) < count:
        raise EOFError
    return block


def message(file, where=None):
    """The msgpack value at a file's position, or in a range of its bytes.  What bin and ext forms
    carry is not read but told as such a range, so that a walk costs no memory."""
    if where is not None:
        file.seek(where.start)
    byte = take(file, 1)[0]
    n = int.from_bytes(take(file, NUMBER_BYTES.get(byte, 0)), "big")
    if byte < 0x80 or byte in (0xC2, 0xC3):
        return byte & 0x7F
    if 0x80 <= byte < 0x90 or byte in (0xDE, 0xDF):
        return {message(file): message(file) for _ in range(byte & 15 if byte < 0x90 else n)}
    if 0x90 <= byte < 0xA0 or byte in (0xDC, 0xDD):
        return [message(file) for _ in range(byte & 15 if byte < 0xA0 else n)]
    if 0xA0 <= byte < 0xC0 or byte in (0xD9, 0xDA, 0xDB):
        return take(file, byte & 31 if byte < 0xC0 else n).decode()
    if 0xCC <= byte <= 0xCF:
        return n
    if 0xD4 <= byte <= 0xD8:
        n = 1 << (byte - 0xD4)
    elif byte not in NUMBER_BYTES:
        raise ValueError
    start = file.tell() + (byte >= 0xD4 or 0xC7 <= byte <= 0xC9)  # behind an ext's type
    file.seek(start + n - 1)
    take(file, 1)  # the last byte is there
    return range(start, start + n)


def read_stream(path):
    """Walk a params file (docs/formats.md) -> {name: (dims, dtype, byte ranges)}.

    Raises ValueError that names the tensor where the file is cut short or holds something else."""
    found, twice, name = {}, [], "the beginning"
    with open(path, "rb") as file:
        try:
            while first := file.read(1):
                name = f"behind {name}"
                if first != b"\x92":  # an array of two: key and blob
                    raise ValueError
                key = message(file)
                name = re.sub("^(params/)+", "", "/".join(key))
                blob = message(file)
                if key[0] in ("step", "opt_state"):  # of a whole training state
                    continue
                value = message(file, blob)
                if isinstance(value, dict):
                    dims, chunks = (
                        [table[str(i)] for i in range(len(table))]
                        for table in (value["shape"], value["chunks"])
                    )
                    arrays = [message(file, chunk) for chunk in chunks]
                else:
                    arrays = [message(file, value)]
                    dims = arrays[0][0]
                file.seek(blob.stop)
                dtype, pieces = DTYPES[arrays[0][1]], [array[2] for array in arrays]
                if sum(map(len, pieces)) != math.prod(dims) * dtype.itemsize:
                    raise ValueError
                twice += [name] * (name in found)
                found[name] = tuple(dims), dtype, pieces
        except EOFError:
            raise ValueError(f"cut short in tensor {name}") from None
        except (ValueError, TypeError, LookupError, AttributeError):
            raise ValueError(f"tensor {name}: not a params stream") from None
    if twice or not found:
        raise ValueError(f"{', '.join(twice)}: more than once" if twice else "holds no tensor")
    return found


def read_pieces(path, dims, dtype, pieces, layer=None):
    """One tensor of a params file, or one layer of it, without reading the others"""
    shape = dims if layer is None else dims[1:]
    need = memoryview(bytearray(math.prod(shape) * dtype.itemsize))
    skip, done = (layer or 0) * len(need), 0
    with open(path, "rb") as file:
        for piece in pieces:
            part, skip = piece[skip : skip + len(need) - done], max(0, skip - len(piece))
            file.seek(part.start)
            done += file.readinto(need[done : done + len(part)])
    return torch.frombuffer(need, dtype=dtype).reshape(shape)


def official_name(name, shape, scanned=0):
    """Our VLA's tensor in a params stream, where kernels are (in, out) and, if scanned, the layers
    (their number) lie in one tensor -> as `matched` wants it"""
    theirs, layer = rename(name, STREAM_KEYS), None
    turned = theirs.endswith("kernel") and len(shape) == 2
    shape = shape[::-1] if turned else shape
    if scanned and (at := re.search(r"/h/(\d+)/", theirs)):
        theirs = theirs.replace(at[0], "/h/scan_decoder/")
        layer, shape = int(at[1]), (scanned, *shape)
    return theirs, shape, lambda read: read(layer).t() if turned else read(layer)


def vla_config(source, official, c, needed, **known):
    """Shape of a VLA that has the first `needed` vocabularies at least, read off its tensors"""
    vocabularies = [f"{kind}_vocab" for kind in VOCABULARIES]
    marks = {field: 1000 + i for i, field in enumerate((*vocabularies, "dim", "mlp"))}
    found = sizes(
        VLA,
        VLAConfig(layers=1, heads=1, **marks),
        source,
        official,
        marks,
        optional=vocabularies[needed:],
    )
    dim, heads = found["dim"], c.heads or known.get("heads") or found["dim"] // 128
    if not heads or dim % heads:
        raise ValueError(f"width {dim} does not divide into {heads} heads: pass --heads")
    return VLAConfig(
        **{
            "rope_theta": c.rope_theta,
            "image_size": c.image_size or 256,
            **known,
            **found,
            "heads": heads,
        }
    )


def from_stream(path, c):
    """A params file -> its VLA's shape, and matched tensors"""
    source = {
        name: (entry[0], partial(read_pieces, path, *entry))
        for name, entry in read_stream(path).items()
    }
    scanned = mode(
        [shape[0] for name, (shape, _) in source.items() if "/scan_decoder/" in name and shape]
        or [0]
    )
    official = partial(official_name, scanned=scanned)
    config = vla_config(
        source,
        official,
        c,
        needed=2,
        rounded_rope=c.rounded_rope,
        layers=scanned or count(source, r"transformer/h/(\d+)/"),
    )
    return config, matched(VLA, config, source, official)


# ------------------------------------------------------------------------ VLA: Hugging Face
def hugging_name(name, shape, heads, back=True):
    """Our VLA's tensor in Hugging Face's layout, where the rotary pairs (0, 1), (2, 3).. of the
    rows of a head of q and k are its two halves instead: evens, then odds (back: to ours)"""

    def take(read):
        if not name.endswith(("wq.weight", "wk.weight")):
            return read()
        pairs = (heads, 2, -1) if back else (heads, -1, 2)
        return read().unflatten(0, pairs).transpose(1, 2).flatten(0, 2)

    return rename(name, HUGGING_KEYS), shape, take


def safetensors_source(path):
    """The tensors of a safetensors file, or of all in a folder"""
    source, read = {}, lambda path, name: safe_open(path, "pt").get_tensor(name)
    for path in common.weight_files(path) if path.is_dir() else [path]:
        with common.refuse(f"{path}", (OSError, SafetensorError)):
            file = safe_open(path, "pt")
        source |= {
            name: (tuple(file.get_slice(name).get_shape()), partial(read, path, name))
            for name in file.keys()
        }
    return source


def from_hugging(path, c):
    """A folder or file in Hugging Face's layout (LWM-Text) -> a VLA of text alone, as above"""
    source = {
        name: entry
        for name, entry in safetensors_source(path).items()
        if not name.endswith("rotary_emb.inv_freq")
    }  # a buffer of old exports
    settings = path / "config.json"
    settings = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    settings |= settings.get("rope_parameters") or {}  # since transformers 5
    known = {
        ours: settings[HUGGING_SETTINGS[ours]]
        for ours in ("heads", "rms_eps", "rope_theta")
        if HUGGING_SETTINGS[ours] in settings
    }
    config = vla_config(
        source,
        partial(hugging_name, heads=0),
        c,
        needed=1,
        patch_size=0,
        layers=count(source, r"model\.layers\.(\d+)\."),
        **known,
    )
    return config, matched(VLA, config, source, partial(hugging_name, heads=config.heads))


def to_hugging(folder):
    """A VLA's text part for transformers.LlamaForCausalLM -> (name, read) pairs, config, files"""
    folder, meta = common.open_checkpoint(folder, "source", ("pretrain", "finetune"))
    config = VLAConfig(**meta["model"])
    tensors = []
    for name, (_, read) in safetensors_source(folder).items():
        if name.startswith(("text_", "layers.", "norm.")):
            theirs, _, take = hugging_name(name, (), config.heads, back=False)
            tensors.append((theirs, partial(take, read)))
    settings = {theirs: getattr(config, ours) for ours, theirs in HUGGING_SETTINGS.items()}
    return (
        tensors,
        settings
        | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "num_key_value_heads": config.heads,
            "max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        },
        {p.name: p for p in folder.glob("tokenizer.json")},
    )


# ------------------------------------------------------------------------ VQGAN: a pickle
VQGAN_KEYS = (  # ours -> official
    (r"^codebook$", "quantize/embeddings"),
    ("^to_code", "quant_conv"),
    ("^from_code", "post_quant_conv"),
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


def rebuild_jax_array(make, arguments, state, _=None):
    array = make(*arguments)
    array.__setstate__(state)
    return array


class ArraysOnly(pickle.Unpickler):
    """Builds dictionaries of numpy arrays and nothing else; anything else is refused by name"""

    ALLOWED = {
        "builtins.dict": dict,
        "collections.OrderedDict": dict,
        "flax.core.frozen_dict.FrozenDict": dict,
        "jax._src.array._reconstruct_array": rebuild_jax_array,
        "jax._src.device_array.reconstruct_device_array": rebuild_jax_array,
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "numpy._core.multiarray._reconstruct": np._core.multiarray._reconstruct,
        "numpy._core.numeric._frombuffer": np._core.numeric._frombuffer,
        "_codecs.encode": lambda text, encoding: text.encode(encoding),
    }  # bytes in old pickles

    def find_class(self, module, name):
        full = f"{module}.{name}".replace("numpy.core.", "numpy._core.")
        if full not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it wants to run {full}, which is not allowed")
        return self.ALLOWED[full]


def read_pickle(path):
    """A pickled nested dictionary of arrays -> {"encoder/Conv_0/kernel": array}"""

    def flatten(tree, at=""):
        if isinstance(tree, dict):
            for key, value in tree.items():
                yield from flatten(value, f"{at}/{key}")
        elif isinstance(tree, np.ndarray) and tree.dtype.kind == "f":
            yield re.sub("^/(params/)?", "", at), torch.from_numpy(np.asarray(tree, np.float32))
        else:
            raise ValueError(
                f"{at[1:] or 'the file'}: {type(tree).__name__}, expected an array of floats"
            )

    try:
        with open(path, "rb") as file:
            return dict(flatten(ArraysOnly(file).load()))
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(f"not a whole pickle of arrays: {error}") from None


def official_vqgan_name(name, shape):
    """Our VQGAN's tensor in the pickle, where convolutions are (height, width, in, out)"""
    theirs = rename(name, VQGAN_KEYS)
    if len(shape) == 4:
        return theirs, (*shape[2:], shape[1], shape[0]), lambda read: read().permute(3, 2, 0, 1)
    return theirs, shape, lambda read: read()


def from_vqgan(path, c):
    """LWM's pickled image tokenizer -> its shape, and matched tensors"""
    source = {name: (tuple(a.shape), lambda a=a: a) for name, a in read_pickle(path).items()}
    level = "encoder/DownsamplingBlock_"
    levels = range(count(source, rf"{level}(\d+)/") or 1)
    marks = {"codebook_size": 1000, "quant_dim": 1001, "z_channels": 1002, "hidden": 3200}
    found = sizes(
        VQGAN,
        VQGANConfig(multipliers=[i + 2 for i in levels], **marks),
        source,
        official_vqgan_name,
        marks | {i: 3200 * (i + 2) for i in levels},
    )
    multipliers = [found.pop(i) // found["hidden"] for i in levels]
    config = VQGANConfig(
        image_size=c.image_size or 256,
        multipliers=multipliers,
        **found,
        blocks=count(source, rf"{level}0/ResnetBlock_(\d+)/"),
    )
    return config, matched(VQGAN, config, source, official_vqgan_name)


# ------------------------------------------------------------------------ LAQ: a torch file
LAQ_KEYS = (  # ours -> official
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


def code_layout(source, patch, c):
    """How many codes a LAQ makes of how many patches a side -> code_len, grid.

    The kernel of its second convolution tells 1 and 2 codes from others.  A 3x3 one makes 4 codes
    of 8 patches a side or 16 of 16, and where there is no second one the patches alone decide: then
    --code_len or --image_size has to say."""
    kernel = source.get("vq.cnn_encoder.2.weight", ((),))[0][2:]
    usual = {(4, 4): {1: 8}, (3, 4): {2: 8}, (3, 3): {4: 8, 16: 16}, (): {64: 16, 256: 32}}
    if kernel not in usual:
        raise ValueError(f"wrong shape: vq.cnn_encoder.2.weight has kernel {kernel}")
    grids = usual[kernel]  # of each code_len
    if c.image_size:
        grid = c.image_size // patch
        code_len = {(3, 3): math.ceil(grid / 4) ** 2, (): math.ceil(grid / 2) ** 2}.get(
            kernel, next(iter(grids))
        )
        if c.code_len and c.code_len != code_len:
            raise ValueError(
                f"its tensors make {code_len} codes of {c.image_size} pixels, not "
                f"--code_len {c.code_len}"
            )
        return code_len, grid
    if not c.code_len and len(grids) > 1:
        choices = " or ".join(f"{n} codes of {grid * patch} pixels" for n, grid in grids.items())
        raise ValueError(f"its tensors fit {choices}: pass --code_len or --image_size")
    code_len = c.code_len or next(iter(grids))
    if code_len not in grids:
        raise ValueError(
            f"its tensors do not make --code_len {code_len}, but "
            + " or ".join(map(str, grids))
            + " (else pass --image_size)"
        )
    return code_len, grids[code_len]


def from_laq(path, c):
    """Official LAQ file (with or without the `module.` prefix) -> its shape, and matched tensors"""
    state = {name.removeprefix("module."): t for name, t in read_torch(path).items()}
    beta = {name: t for name, t in state.items() if name.endswith(".beta")}  # zero buffers
    source = {
        name: (tuple(t.shape), t.float)
        for name, t in state.items()
        if name not in beta and not (name.endswith(".null_kv") and not t.numel())
    }  # of self-attention
    official = lambda name, shape: (rename(name, LAQ_KEYS), shape, lambda read: read())
    depths = {
        field: count(source, rf"{part}_transformer\.layers\.(\d+)\.")
        for field, part in (
            ("spatial_depth", "enc_spatial"),
            ("temporal_depth", "enc_temporal"),
            ("decoder_depth", "dec_spatial"),
        )
    }
    marks = {"codebook_size": 1000, "quant_dim": 1001, "dim": 1002, "heads": 1003, "dim_head": 1004}
    found = sizes(
        LAQ,
        LAQConfig(patch_size=32, **depths, **marks),
        source,
        official,
        marks | {"patch_size": 3 * 32**2},
    )
    patch = found["patch_size"] = math.isqrt(found["patch_size"] // 3)
    code_len, grid = code_layout(source, patch, c)
    config = LAQConfig(
        image_size=c.image_size or grid * patch,
        code_len=code_len,
        official_peg=True,
        official_code_read=True,
        **depths,
        **found,
    )
    source["vq.uses"] = (config.codebook_size,), partial(torch.zeros, config.codebook_size)  # ours
    pairs = matched(LAQ, config, source, official)
    problems = differences(
        {name[:-5] + "beta": t.shape for name, t in state.items() if name.endswith("gamma")},
        {name: t.shape for name, t in beta.items()},
    )
    if problems := problems or ", ".join(name for name, t in beta.items() if t.any()):
        raise ValueError(f"{problems}: expected zeros for each gamma")
    return config, pairs


def read_torch(path):
    """A flat dictionary of tensors from torch.save or safetensors"""
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # a broken pickle can raise anything
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"it wants {named[1]}, which is not allowed" if named else "not a file of tensors"
        ) from None
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise ValueError("expected a flat dictionary of tensors")
    return state


# ------------------------------------------------------------------------ tokenizer, bins
def tokenizer_from(path):
    """A SentencePiece BPE model (Llama's tokenizer.model) -> tokenizer.json's text"""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        common.fail(f"{path}: reading it needs sentencepiece (pip install sentencepiece)")
    pieces = SentencePieceProcessor(model_file=str(path))
    rank = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    cuts = ((word, word[:at], word[at:]) for word in rank for at in range(1, len(word)))
    merges = sorted(
        (-pieces.get_score(rank[word]), rank[a], rank[b], (a, b))
        for word, a, b in cuts
        if a in rank and b in rank
    )
    tokenizer = Tokenizer(
        models.BPE(
            rank,
            [merge[-1] for merge in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens(
        [  # the official tokenizer drops blanks beside them
            AddedToken(word, lstrip=True, rstrip=True, normalized=False) for word in ("<s>", "</s>")
        ]
    )
    return tokenizer.to_str()


# ------------------------------------------------------------------------ command line
def kind_of(path):
    """What an official file holds: vqgan, stream, hugging, laq, tokenizer or edges"""
    if path.is_dir() or path.suffix == ".safetensors":
        return "laq" if any("vq." in name for name in safetensors_source(path)) else "hugging"
    known = {".model": "tokenizer", ".json": "tokenizer", ".csv": "edges", ".pt": "laq"}
    if path.suffix in known:
        return known[path.suffix]
    with open(path, "rb") as file:
        return {b"P": "laq", b"\x92": "stream"}.get(file.read(1), "vqgan")


def read_edges(path):
    """Official csv of bin edges: one row a dimension, columns 0..n, short rows end early"""
    head, *rows = path.read_text(encoding="utf-8-sig").splitlines()
    edges = [
        [float(cell) for cell in row.split(",")[head.startswith(",") :] if cell] for row in rows
    ]  # a nameless first column numbers the rows
    for i, row in enumerate(edges):
        if not row or not all(map(math.isfinite, row)) or row != sorted(set(row)):
            raise ValueError(f"row {i}: expected edges in increasing order")
    return edges


def convert(c):
    meta, models, files = {"stage": "vqgan", "model": {}, "step": 0}, {}, {}
    if Path(c.out).exists():
        common.fail(f"{c.out} exists: remove it or choose another folder")
    if c.to not in ("", "hf") or c.to and len(c.source) > 1:
        common.fail(f"--to {c.to}: expected hf, and one checkpoint")
    for path in map(Path, c.source):
        with common.refuse(f"{path}", Exception):  # a broken file can raise anything
            kind = c.to or kind_of(path)
            if kind == "hf":
                models[path], meta, files = to_hugging(path)
            elif kind == "laq":
                config, models[path] = from_laq(path, c)
                meta |= {"stage": "quantize", "window": c.window, "model": asdict(config)}
            elif kind == "vqgan":
                vqgan, pairs = from_vqgan(path, c)
                meta["vqgan"] = asdict(vqgan)
                files["vqgan.safetensors"] = [(name, read()) for name, read in pairs]
            elif kind in ("stream", "hugging"):
                config, models[path] = (from_stream if kind == "stream" else from_hugging)(path, c)
                meta |= {
                    "stage": "finetune" if config.action_vocab else "pretrain",
                    "labels": "official",
                    "template": OFFICIAL_TEMPLATE,
                    "model": asdict(config),
                }
                files |= {p.name: p for p in path.glob("tokenizer.json")}
            elif kind == "tokenizer":
                files["tokenizer.json"] = path if path.suffix == ".json" else tokenizer_from(path)
            else:
                meta["bins"] = read_edges(path)
    if len(models) > 1 or not models and "vqgan" not in meta:
        common.fail(f"{' '.join(c.source)}: expected one model among them, found {len(models)}")
    if "vqgan" in meta and "vision_vocab" in meta["model"]:
        meta["model"]["patch_size"] = 2 ** (len(meta["vqgan"]["multipliers"]) - 1)
    most = max(map(len, meta.get("bins", [[]])), default=0) - 1
    if "bins" in meta and not 0 <= most <= meta["model"].get("action_vocab", 0):
        common.fail(f"{' '.join(c.source)}: {most} action bins do not fit the model")
    bar = tqdm(next(iter(models.values()), []), "tensors", mininterval=1.0)
    with common.refuse(f"{c.out}", Exception), common.atomically(c.out) as draft:
        common.write_checkpoint(draft, ((name, read()) for name, read in bar), meta, files)
    print(f"wrote {c.out}/: " + ", ".join(sorted(p.name for p in Path(c.out).iterdir())))


if __name__ == "__main__":
    convert(common.parse_options(ConvertConfig, sys.argv[1:], positional=("source", "out"))[0])
