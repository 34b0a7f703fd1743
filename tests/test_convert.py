"""Official files: every layout, what becomes of them here, and what is refused."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from recordings import arrays, load_laq, load_vla, recording, values
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

import common
import data
import quantize
import sequences
from model import LAQ, TEXT, VLA, LAQConfig, VLAConfig, load_strictly
from official.laq import LAQ_NAMES
from official.msgpack_stream import read_stream
from official.pickles import read_pickle
from official.tensors import rename
from official.tokenizer import convert_tokenizer

LAYOUTS = "params", "params_fp32", "params_unscanned", "params_chunked"
HUGGING = "vla/hf_text_model.safetensors"


@pytest.fixture
def convert(inside: Callable[..., int]) -> Callable[..., int]:
    """convert(source, .., out, "--heads", 4) -> exit code"""
    return lambda *words: inside("-m", "official.convert", *words)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(tmp_path / "x.png")
    return tmp_path / "x.png"


def load_vqgan_pickle() -> dict:
    with open(recording("vqgan/vqgan"), "rb") as file:
        return pickle.load(file)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two tables of tensors hold the same"""
    return first.keys() == second.keys() and all(
        torch.equal(first[name][:], second[name][:]) for name in first
    )


# ---------------------------------------------------------------- params streams
def split_stream(path: Path) -> tuple[list[tuple[str, int, int]], bytes]:
    """A params file -> (name, begin, end) of each tensor's message, and all its bytes"""
    blob = path.read_bytes()
    found, begin = [], 0
    for name, tensor in read_stream(path).items():
        end = tensor.pieces[-1].stop
        found.append((name, begin, end))
        begin = end
    assert end == len(blob)
    return found, blob


@pytest.mark.parametrize("folder", ["vla", "vla_action"])
def test_all_layouts_give_identical_weights(folder):
    first, *others = (load_vla(recording(f"{folder}/{name}")).state_dict() for name in LAYOUTS)
    assert all(equal(first, other) for other in others)


def test_chunks_are_joined_by_number(tmp_path):
    """However their map is sorted: where the first two have changed names, they change places"""
    source = recording("vla/params_chunked")
    blob = bytearray(source.read_bytes())
    name, tensor = next((n, t) for n, t in read_stream(source).items() if len(t.pieces) > 1)
    first, second, *others = tensor.pieces
    blob[blob.rindex(b"\xa10", 0, first.start) + 1] = ord("1")
    blob[first.stop + 1] = ord("0")
    (tmp_path / "params").write_bytes(blob)
    assert read_stream(tmp_path / "params")[name].pieces == [second, first, *others]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_broken_stream_is_refused_by_the_tensor_and_leaves_nothing(
    layout, convert, tmp_path, capsys
):
    found, blob = split_stream(recording(f"vla/{layout}"))
    intact = tmp_path / "intact"
    intact.write_bytes(blob)
    name, begin, end = found[len(found) // 2]
    stray = blob[begin:end].replace(b"kernel", b"kernal").replace(b"embedding", b"embodding")
    for broken, said in (
        (blob[: end - 1], f"cut short in tensor {name}"),
        (blob[: begin + 3], "cut short in tensor"),
        (blob[:begin] + blob[end:], "missing: "),
        (blob + stray, "unexpected: "),
        (blob[:end] + b"\x93" + blob[end:], "not a params stream"),
        (blob + blob[begin:end], f"{name}: more than once"),
        (b"", "not a whole pickle"),
    ):
        source = tmp_path / "params"
        source.write_bytes(broken)
        assert convert(source, tmp_path / "out", "--heads", 4) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {source}: ") and said in error
        assert sorted(p.name for p in tmp_path.iterdir()) == ["intact", "params"]
    assert convert(intact, tmp_path / "out", "--heads", 4) == 0


def pack_text(text: str) -> bytes:
    return b"\xd9" + bytes([len(text)]) + text.encode()


def pack_zeros(key: str, dims: tuple[int, ...]) -> bytes:
    """A bfloat16 tensor of zeros as a message of a params stream"""
    size = 2 * int(np.prod(dims))
    shape = bytes([0x90 + len(dims)]) + b"".join(b"\xcd" + n.to_bytes(2, "big") for n in dims)
    array = b"\x93" + shape + pack_text("bfloat16") + b"\xc6" + size.to_bytes(4, "big")
    ext = b"\xc9" + (len(array) + size).to_bytes(4, "big") + b"\x01" + array
    words = key.split("/")
    packed_key = bytes([0x90 + len(words)]) + b"".join(map(pack_text, words))
    blob = b"\xc6" + (len(ext) + size).to_bytes(4, "big") + ext
    return b"\x92" + packed_key + blob + bytes(size)


def write_params(
    path: Path, dim: int, mlp: int, layers: int, changed: dict[str, tuple[int, ...]] | None = None
) -> int:
    """A params stream of small vocabularies and zeros, some shapes changed -> bytes of its largest
    tensor"""
    block = "transformer/h/scan_decoder/"
    tensors = {
        "transformer/wte/embedding": (320, dim),
        "lm_head/kernel": (dim, 320),
        "transformer/vte/embedding": (320, dim),
        "vision_head/kernel": (dim, 320),
        "transformer/ln_f/kernel": (dim,),
        **{f"{block}attention/w{w}/kernel": (layers, dim, dim) for w in "qkvo"},
        f"{block}feed_forward/w1/kernel": (layers, dim, mlp),
        f"{block}feed_forward/w2/kernel": (layers, mlp, dim),
        f"{block}feed_forward/w3/kernel": (layers, dim, mlp),
        f"{block}attention_norm/kernel": (layers, dim),
        f"{block}ffn_norm/kernel": (layers, dim),
        **(changed or {}),
    }
    with open(path, "wb") as file:
        for key, dims in tensors.items():
            file.write(pack_zeros(key, dims))
    return max(2 * int(np.prod(dims)) for dims in tensors.values())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc to read peaks from")
def test_conversion_holds_three_tensors_and_a_shard_at_most(tmp_path):
    script = (
        "import sys, runpy; sys.path.insert(0, {0!r}); sys.argv[1:] = [{1!r}, {2!r}]\n"
        "runpy.run_module('official.convert', run_name='__main__', alter_sys=True)\n"
        "print(next(line for line in open('/proc/self/status') if 'VmHWM' in line))"
    )
    peak = {}
    for name, layers in (("small", 1), ("large", 24)):
        source = tmp_path / name
        largest = write_params(source, 1024, 2752, layers)
        done = subprocess.run(
            [sys.executable, "-c", script.format(str(ROOT), str(source), str(source) + ".out")],
            capture_output=True,
            text=True,
            check=True,
        )
        peak[name] = 1024 * int(done.stdout.split()[-2])
    shard = source.stat().st_size  # all of it, since it is under the 2 GB of a shard
    assert shard > 500e6 and peak["large"] - peak["small"] < 3 * largest + shard


def test_large_checkpoints_are_written_in_shards(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    common.save_weights(tmp_path, tensors.items(), shard=80)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)
    ] + ["model.safetensors.index.json"]
    files = common.weight_files(tmp_path)
    assert equal({n: t for file in files for n, t in load_file(file).items()}, tensors)


# ---------------------------------------------------------------- Hugging Face's layout
def test_hugging_face_layout_both_ways(convert, tmp_path):
    source = recording(HUGGING)
    assert convert(source, tmp_path / "ours", "--heads", 4) == 0
    weights, meta = common.load_checkpoint(tmp_path / "ours", "x", ("pretrain",))
    net = VLA(VLAConfig(**meta["model"]))
    load_strictly(net, weights)
    text = arrays("vla/inputs.npz")["text.input_ids"].long()
    logits = net.score(net(text, torch.zeros_like(text)), TEXT)
    known = arrays("vla/golden_fp32.npz")["text.lm_logits"]
    torch.testing.assert_close(logits, known, rtol=0, atol=1e-4)

    assert convert(tmp_path / "ours", tmp_path / "hf", "--to", "hf") == 0
    assert equal(load_file(tmp_path / "hf/model.safetensors"), load_file(source))
    found = json.loads((tmp_path / "hf/config.json").read_text())
    known = values("vla/hf_text_config.json")
    del known["max_position_embeddings"]  # ours: 4096
    assert {key: found[key] for key in known} == known


def test_a_folder_of_shards_is_read(convert, tmp_path):
    """With an index, as large models come in Hugging Face's layout"""
    weights = load_file(recording(HUGGING))
    names = sorted(weights)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    (tmp_path / "shards").mkdir()
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, tmp_path / "shards" / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "shards/model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(recording("vla/hf_text_config.json"), tmp_path / "shards/config.json")
    assert convert(tmp_path / "shards", tmp_path / "sharded") == 0  # config.json tells the heads
    assert convert(recording(HUGGING), tmp_path / "one", "--heads", 4) == 0
    found, _ = common.load_checkpoint(tmp_path / "sharded", "x", ("pretrain",))
    known, _ = common.load_checkpoint(tmp_path / "one", "x", ("pretrain",))
    assert equal(found, known)


def test_exported_files_run_in_transformers(convert, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert convert(recording("vla/params"), tmp_path / "ours", "--heads", 4) == 0
    assert convert(tmp_path / "ours", tmp_path / "hf", "--to", "hf") == 0
    net = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        logits = net(arrays("vla/inputs.npz")["text.input_ids"].long()).logits
    known = arrays("vla/golden_fp32.npz")["text.lm_logits"]
    torch.testing.assert_close(logits, known, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- LAQ
def test_pt_and_safetensors_give_the_same_laq():
    first, second = (load_laq(recording(f"laq/{n}")) for n in ("laq.pt", "model.safetensors"))
    assert first.config == second.config
    assert equal(first.state_dict(), second.state_dict())


def test_a_converted_laq_labels_as_officially(convert, tmp_path):
    golden = arrays("laq/golden.npz")
    assert convert(recording("laq/laq.pt"), tmp_path / "laq", "--code_len", 4) == 0
    net, meta = quantize.load_laq(tmp_path / "laq")
    codes = net.cpu().label(data.to_float(golden["video_u8"].numpy()))
    assert meta["window"] == 0.6 and torch.equal(codes, golden["indices"].long())


@pytest.mark.parametrize(
    "code_len, size, needed",
    [
        (1, 32, ()),
        (2, 32, ()),
        (4, 32, ("--code_len", 4)),
        (16, 64, ("--code_len", 16)),
        (64, 64, ("--image_size", 64)),
        (256, 128, ("--code_len", 256)),
    ],
)
def test_a_laq_of_each_number_of_codes_is_converted(
    convert, tmp_path, capsys, code_len, size, needed
):
    config = LAQConfig(
        image_size=size,
        patch_size=4,
        dim=32,
        heads=4,
        dim_head=8,
        spatial_depth=1,
        temporal_depth=1,
        decoder_depth=1,
        quant_dim=8,
        code_len=code_len,
        official_peg=True,
        official_code_read=True,
    )
    net = LAQ(config)
    official = {rename(name, LAQ_NAMES): t for name, t in net.state_dict().items()}
    del official["vq.uses"]  # ours
    for name, gamma in list(official.items()):
        if name.endswith("gamma"):
            official[name.removesuffix("gamma") + "beta"] = torch.zeros_like(gamma)
    torch.save(official, tmp_path / "laq.pt")
    if needed:  # nothing is guessed
        assert convert(tmp_path / "laq.pt", tmp_path / "none") == 2
        assert "pass --code_len or --image_size" in capsys.readouterr().err
    assert convert(tmp_path / "laq.pt", tmp_path / "laq", *needed) == 0
    again, _ = quantize.load_laq(tmp_path / "laq")
    assert again.config == config
    pair = torch.rand(3, 2, 3, size, size)
    assert torch.equal(again.difference(pair), net.eval().difference(pair))


@pytest.mark.parametrize("more", [("--code_len", 2), ("--code_len", 4, "--image_size", 128)])
def test_a_number_of_codes_that_a_file_does_not_hold_is_refused(convert, tmp_path, capsys, more):
    assert convert(recording("laq/laq.pt"), tmp_path / "laq", *more) == 2
    assert f"--code_len {more[1]}" in capsys.readouterr().err


# ---------------------------------------------------------------- tokenizer
def test_sentencepiece_model_becomes_an_equal_tokenizer(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = [
        "pick up the milk and put it in the sink",
        "push the red block",
        "ASSISTANT: </vision>",
        "What action should the robot take to `close the drawer`",
        "<delta> 0 1 é ß",
    ] * 9
    (tmp_path / "text").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "t"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        pad_id=-1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    ours = Tokenizer.from_str(convert_tokenizer(tmp_path / "t.model"))
    more = ["  two  blanks ", "unseen Words 日本", "<vision>", "pushpushpush the the"]
    for text in texts + more:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text
    body = theirs.encode("push the red block")
    assert ours.encode("<s> <s> push the red block", add_special_tokens=False).ids == [1, 1, *body]


# ---------------------------------------------------------------- through every stage
def test_official_weights_through_every_stage(
    inside, convert, make_dataset, picture, tmp_path, capsys
):
    """Convert, pretrain, finetune, predict: a small official model on a dataset of ours"""
    root = make_dataset({"a": 6, "b": 5}, size=40)
    tokenizer = sequences.train_tokenizer(["push it", sequences.OFFICIAL_TEMPLATE])
    tokenizer.save(str(root / "tokenizer.json"))
    short = ("--steps", 2, "--batch", 2, "--held_out", 1, "--data", root)
    laq = tmp_path / "laq"
    assert inside("quantize.py", "--preset", "tiny", *short, "--out", laq) == 0
    lapa7b, lwm = recording("sampler/params"), tmp_path / "params"
    found, blob = split_stream(lapa7b)  # LWM itself knows no latent actions
    kept = [blob[begin:end] for name, begin, end in found if not re.search("dte|delta", name)]
    lwm.write_bytes(b"".join(kept))
    beside = recording("sampler/vqgan"), root / "tokenizer.json"
    assert convert(lapa7b, *beside, tmp_path / "lapa7b", "--heads", 2) == 0
    assert convert(lwm, *beside, tmp_path / "lwm", "--heads", 2) == 0
    lapa = ("--preset", "lapa", *short, "--init_from")
    more = ("--laq", laq, "--official_text_mask", "true", "--out", tmp_path / "lapa")
    assert inside("pretrain.py", *lapa, tmp_path / "lwm", *more) == 0
    (codes,) = (tmp_path / "cache").glob("codes_*/*.bin")
    assert codes.stat().st_size == (5 + 6) * 256 * 2
    assert "fresh: latent_embed.weight, latent_head.weight\n" in capsys.readouterr().out
    for shift in (0, 0.1):
        more = ("--shift", shift, "--out", tmp_path / f"robot{shift}")
        assert inside("finetune.py", *lapa, tmp_path / "lapa", *more) == 0
    ask = ("evaluate.py", "predict", "--instruction", "push it", "--policy")
    for run, said, n in (
        ("lapa7b", "latent action: [", 4),
        ("lapa", "latent action: [", 4),
        ("robot0", "action: [", 2),
    ):
        capsys.readouterr()
        assert inside(*ask, tmp_path / run, "--image", picture) == 0
        out = capsys.readouterr().out
        assert out.startswith(said) and out.split("]")[0].count(",") == n - 1
    assert inside(*ask, tmp_path / "lapa", "--image", tmp_path / "none.png") == 2


# ---------------------------------------------------------------- refusals
def cut_columns(weights: dict, name: str) -> None:
    weights[name] = weights[name][:, 1:].clone()


def remove(weights: dict, name: str) -> None:
    del weights[name]


def add_ones(weights: dict, name: str) -> None:
    weights[name] = torch.ones(64)


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("dec_spatial_transformer.norm_out.gamma", remove, "missing: {}"),
        ("vq.surprise", add_ones, "unexpected: {}"),
        ("vq.project_in.weight", cut_columns, "{} (16, 63), expected (16, 64)"),
        ("dec_spatial_transformer.norm_out.beta", add_ones, "{}: expected zeros"),
        ("vq.codebooks", remove, "missing: {}"),
    ],
)
def test_wrong_tensors_of_a_laq_are_refused_by_name(tmp_path, name, change, said):
    state = load_file(recording("laq/model.safetensors"))
    change(state, name)
    save_file(state, tmp_path / "laq.safetensors")
    with pytest.raises(ValueError, match=re.escape(said.format(name))):
        load_laq(tmp_path / "laq.safetensors")


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("model.layers.1.mlp.up_proj.weight", cut_columns, "{} (128, 63), expected (128, 64)"),
        ("model.norm.weight", remove, "missing: {}"),
        ("stray.weight", add_ones, "unexpected: {}"),
    ],
)
def test_wrong_tensors_of_a_text_model_are_refused_by_name(
    convert, tmp_path, capsys, name, change, said
):
    weights = load_file(recording(HUGGING))
    change(weights, name)
    save_file(weights, tmp_path / "x.safetensors")
    assert convert(tmp_path / "x.safetensors", tmp_path / "o", "--heads", 4) == 2
    assert said.format(name) in capsys.readouterr().err and not (tmp_path / "o").exists()


FIRST_FRAME = "to_patch_emb_first_frame"


@pytest.mark.parametrize(
    "file, name, axis",
    [
        (HUGGING, "model.embed_tokens.weight", 0),
        (HUGGING, "model.embed_tokens.weight", 1),
        (HUGGING, "lm_head.weight", 0),
        (HUGGING, "lm_head.weight", 1),
        (HUGGING, "model.norm.weight", 0),
        (HUGGING, "model.layers.0.mlp.gate_proj.weight", 0),
        (HUGGING, "model.layers.0.mlp.down_proj.weight", 1),
        ("laq/model.safetensors", f"{FIRST_FRAME}.1.weight", 0),
        ("laq/model.safetensors", f"{FIRST_FRAME}.2.weight", 0),
        ("laq/model.safetensors", f"{FIRST_FRAME}.2.weight", 1),
        ("laq/model.safetensors", "spatial_rel_pos_bias.net.2.weight", 0),
        ("laq/model.safetensors", "enc_spatial_transformer.layers.0.1.q_scale", 0),
        ("laq/model.safetensors", "vq.project_in.weight", 0),
        ("laq/model.safetensors", "vq.project_in.weight", 1),
        ("laq/model.safetensors", "vq.codebooks", 1),
        ("laq/model.safetensors", "vq.cnn_encoder.2.weight", 0),
        ("laq/model.safetensors", "vq.cnn_encoder.2.weight", 2),
        ("laq/model.safetensors", "enc_spatial_transformer.norm_out.beta", 0),
    ],
)
def test_wrong_shapes_name_the_wrong_tensor(convert, tmp_path, capsys, file, name, axis):
    """Also where the configuration is read off it"""
    tensors = load_file(recording(file))
    longer = torch.cat((tensors[name], tensors[name].narrow(axis, 0, 1)), axis)
    save_file({**tensors, name: longer}, tmp_path / "x.safetensors")
    out = tmp_path / "o"
    assert convert(tmp_path / "x.safetensors", out, "--heads", 4, "--code_len", 4) == 2
    said = capsys.readouterr().err
    assert "wrong shape: " in said and name in said and not out.exists()
    assert set(re.findall(r"([\w.]+) \([\d, ]+\), expected", said)) <= {name}  # no other one


@pytest.mark.parametrize(
    "name, shape",
    [
        ("transformer/wte/embedding", (320, 257)),
        ("transformer/wte/embedding", (321, 256)),
        ("lm_head/kernel", (257, 320)),
        ("vision_head/kernel", (256, 319)),
        ("transformer/ln_f/kernel", (255,)),
        ("transformer/ln_f/kernel", ()),
        ("transformer/h/scan_decoder/attention/wq/kernel", (4, 256, 256)),
        ("transformer/h/scan_decoder/feed_forward/w1/kernel", (3, 256, 383)),
        ("transformer/h/scan_decoder/feed_forward/w2/kernel", (2, 384, 256)),
        ("delta_head/kernel", (256, 8)),
    ],
)
def test_wrong_shapes_of_a_stream_name_the_wrong_tensor(convert, tmp_path, capsys, name, shape):
    write_params(tmp_path / "params", 256, 384, 3, {name: shape})
    assert convert(tmp_path / "params", tmp_path / "o") == 2
    said = capsys.readouterr().err
    if name == "delta_head/kernel":  # a head alone
        assert said.endswith("missing: transformer/dte/embedding\n")
    else:
        assert "wrong shape: " in said and name in said
        assert set(re.findall(r"([\w/]+) \([\d, ]*\), expected", said)) <= {name}


@pytest.mark.parametrize(
    "part",
    [
        "encoder/Conv_0",
        "encoder/Conv_1",
        "encoder/DownsamplingBlock_1/ResnetBlock_0/Conv_0",
        "quant_conv",
    ],
)
def test_wrong_shapes_of_a_vqgan_name_the_wrong_tensor(convert, tmp_path, capsys, part):
    pickled = load_vqgan_pickle()
    convolution = pickled
    for word in part.split("/"):
        convolution = convolution[word]
    kernel = convolution["kernel"]
    convolution["kernel"] = np.concatenate((kernel, kernel[..., :1]), -1)
    (tmp_path / "vqgan").write_bytes(pickle.dumps(pickled))
    assert convert(tmp_path / "vqgan", tmp_path / "o") == 2
    said = capsys.readouterr().err
    assert f"wrong shape: {part}/kernel" in said and said.count("expected") == 1


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("owned"),))


def test_pickles_may_hold_arrays_only(convert, tmp_path, capsys):
    good = load_vqgan_pickle()
    kernel = good["quant_conv"]["kernel"]
    source = tmp_path / "vqgan"
    for content, said in (
        (pickle.dumps({**good, "x": Evil()}), "pathlib"),
        (pickle.dumps(good)[:-2000], "not a whole pickle"),
        (b"\x80\x04junk", "pickle"),
        (pickle.dumps({**good, "x": np.ones(2)}), "unexpected: x"),
        (pickle.dumps({**good, "x": "text"}), "x: str"),
        (pickle.dumps({**good, "quant_conv": {"kernel": kernel}}), "missing: quant_conv/bias"),
        (
            pickle.dumps({**good, "quant_conv": {"kernel": kernel, "bias": np.ones(3)}}),
            "quant_conv/bias (3,)",
        ),
    ):
        source.write_bytes(content)
        assert convert(source, tmp_path / "out") == 2
        assert said in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == ["vqgan"]
    for protocol in range(6):  # as written by any Python
        source.write_bytes(pickle.dumps({"params": good}, protocol))
        assert len(read_pickle(source)) == len(values("vqgan/info.json")["keys"])


@pytest.mark.parametrize("content", [b"junk", b"PKjunk", [1, 2], {"a": slice(1)}], ids=str)
def test_convert_refuses_files_that_hold_anything_but_tensors(convert, tmp_path, capsys, content):
    source = tmp_path / "bad.pt"
    if isinstance(content, bytes):
        source.write_bytes(content)
    else:
        torch.save(content, source)
    assert convert(source, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {source}") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_torch_files_run_nothing(convert, tmp_path, capsys):
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    assert convert(tmp_path / "evil.pt", tmp_path / "o") == 2
    said = capsys.readouterr().err
    assert "it wants getattr" in said and said.count("\n") == 1


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., None]:
    """refused(exit code, words): it was 2, one line said these words, and nothing was written"""

    def check(code: int, *words: str) -> None:
        said = capsys.readouterr().err.split("\r")[-1]
        assert code == 2 and all(word in said for word in words) and said.count("\n") == 1, said
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))

    return check


def test_weights_that_do_not_belong_together_are_refused(
    inside, convert, refused, picture, tmp_path, capsys
):
    params, own_vqgan = recording("sampler/params"), recording("sampler/vqgan")
    tokenizer = sequences.train_tokenizer(["push it", sequences.OFFICIAL_TEMPLATE])
    tokenizer.save(str(tmp_path / "blob"))
    link = tmp_path / "links/tokenizer.json"
    link.parent.mkdir()
    link.symlink_to("../blob")  # as in Hugging Face's cache
    other, own, text = (tmp_path / name for name in ("other", "own", "text"))
    assert convert(params, recording("vqgan/vqgan"), link, other, "--heads", 2) == 0
    assert convert(params, own_vqgan, link, own, "--heads", 2) == 0
    assert convert(recording(HUGGING), link, text, "--heads", 4) == 0
    capsys.readouterr()

    assert json.loads((other / "tokenizer.json").read_text())
    meta = json.loads((other / "config.json").read_text())
    levels = len(meta["vqgan"]["multipliers"])
    assert levels == 3  # the patch is the VQGAN's: 4 pixels, not 16 as in `own`
    assert meta["model"]["patch_size"] == 2 ** (levels - 1)
    shutil.copy(other / "vqgan.safetensors", own)
    own_meta = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**own_meta, "vqgan": meta["vqgan"]}))
    ask = ("evaluate.py", "predict", "--image", picture, "--instruction", "push it", "--policy")
    refused(inside(*ask, own), "pixels each do not fit")
    refused(inside(*ask, text), "predicts neither latent nor robot")

    out = tmp_path / "out"
    refused(convert(params, recording(HUGGING), out, "--heads", 2), "among them, found 2")
    refused(convert(tmp_path / "blob", out), "blob")


def test_bins_that_do_not_fit_are_refused(convert, refused, tmp_path):
    bins, out = tmp_path / "bins.csv", tmp_path / "out"
    params = recording("vla_action/params")
    for content, said in (
        ("0,1\n1,0\n", "row 0"),
        ("0,1\n", "-1 action bins"),
        ("0,1\n1,nan\n", "row 0"),
        ("0,1\n0.5,1\n\n", "row 1"),
    ):
        bins.write_text(content)
        refused(convert(params, bins, out, "--heads", 4), said)
    bins.write_text(",0,1,2\n0,-1,0,1\n1,-2,2,\n")
    refused(convert(recording("sampler/params"), bins, out, "--heads", 2), "2 action bins")
    assert convert(params, bins, out, "--heads", 4) == 0
    meta = json.loads((out / "config.json").read_text())
    assert meta["bins"] == [[-1, 0, 1], [-2, 2]]
