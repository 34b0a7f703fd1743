"""The official VLA and VQGAN: their numbers, their sequences, their files.

Reads the recordings in ../shared/fixtures, which a user does not have."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import common
import data
import evaluate
import finetune
import model
import pretrain
import sequences
from model import ACTION, LATENT, TEXT, VISION, VLA, VLAConfig
from official import convert
from official.vqgan import VQGAN, VQGANConfig

FIXTURES = Path(__file__).resolve().parents[2] / "shared/fixtures"
pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no recordings at {FIXTURES}")
LAYOUTS = "params", "params_fp32", "params_unscanned", "params_chunked"
LOGITS = {TEXT: "lm", VISION: "vision", LATENT: "delta", ACTION: "action"}


def arrays(path):
    return {k: torch.from_numpy(v) for k, v in np.load(FIXTURES / path).items()}


def info(folder):
    return json.loads((FIXTURES / folder / "info.json").read_text())


def options(**more):
    return convert.ConvertConfig(source=[], out="", heads=4, **more)


def load(path, **more):
    config, pairs = convert.from_stream(FIXTURES / path, options(rounded_rope=False, **more))
    net = VLA(config)
    common.load_strictly(net, {name: read() for name, read in pairs})
    return net


def kinds_of(batch, prefix, like):
    kinds = torch.zeros_like(like).long()
    for kind, name in LOGITS.items():
        kinds[batch.get(f"{prefix}{name}_masks", torch.zeros_like(like)).bool()] = kind
    return kinds


def rows_of(batch):
    tokens, targets = batch["train.input_tokens"].long(), batch["train.target_tokens"].long()
    return {
        "tokens": tokens,
        "targets": targets,
        "images": None,
        "kinds": kinds_of(batch, "train.input_", tokens),
        "target_kinds": kinds_of(batch, "train.target_", tokens),
        "mask": batch["train.loss_masks"] > 0,
    }


def assert_logits(net, hidden, golden, prefix, where=slice(None)):
    for kind in net.heads():
        found = net.score(hidden, kind)[where]
        torch.testing.assert_close(
            found, golden[f"{prefix}.{LOGITS[kind]}_logits"][where], rtol=0, atol=1e-4
        )


# ---------------------------------------------------------------- VQGAN
def load_vqgan(folder):
    config, pairs = convert.from_vqgan(FIXTURES / folder / "vqgan", options())
    net = VQGAN(config)
    common.load_strictly(net, {name: read() for name, read in pairs})
    return net


def test_vqgan_gives_the_official_codes_and_pictures():
    net, golden = load_vqgan("vqgan"), arrays("vqgan/golden.npz")
    codes = net.encode(golden["pixel_values"].permute(0, 3, 1, 2))
    assert torch.equal(codes, golden["indices"].flatten(1).long())
    torch.testing.assert_close(
        net.decode(codes).permute(0, 2, 3, 1), golden["recon"], rtol=0, atol=1e-4
    )


def test_full_sizes_have_the_official_tensors():
    with torch.device("meta"):
        assert sum(p.numel() for p in VLA(VLAConfig()).parameters()) == 6_807_687_168
        vqgan = VQGAN(VQGANConfig())
        for folder, vocabulary in (("vla", 0), ("vla_action", 256)):
            net = VLA(VLAConfig(action_vocab=vocabulary))
            found = {}
            for name, tensor in net.state_dict().items():
                theirs, shape, _ = convert.official_name(name, tuple(tensor.shape), scanned=32)
                found[theirs] = list(shape)
            keys = json.loads((FIXTURES / folder / "full_7b_keys.json").read_text())
            assert found == keys
    assert sum(p.numel() for p in net.parameters()) == 6_809_784_320
    assert sum(p.numel() for p in vqgan.parameters()) == 146_244_675
    keys = json.loads((FIXTURES / "vqgan/full_config_keys.json").read_text())
    names = {
        convert.rename(n, convert.VQGAN_KEYS): t.numel() for n, t in vqgan.state_dict().items()
    }
    assert names == {key: int(np.prod(shape)) for key, shape in keys.items()}


# ---------------------------------------------------------------- VLA
@pytest.mark.parametrize("folder", ["vla", "vla_action"])
def test_vla_gives_the_official_logits_and_codes(folder):
    net, batch = load(f"{folder}/params"), arrays(f"{folder}/inputs.npz")
    golden, rows = arrays(f"{folder}/golden_fp32.npz"), rows_of(batch)
    assert_logits(net, net(rows["tokens"], rows["kinds"]), golden, "train")
    tokens, valid = batch["prefill.input_ids"].long(), batch["prefill.attention_mask"].bool()
    kinds = kinds_of(batch, "prefill.", tokens)
    assert_logits(net, net(tokens, kinds, valid=valid), golden, "prefill", valid)
    text = batch["text.input_ids"].long()
    assert_logits(net, net(text, torch.zeros_like(text)), golden, "text")
    kind = ACTION if folder == "vla_action" else LATENT
    greedy = golden["gen.greedy_tokens"].long()
    assert torch.equal(net.generate(tokens, kinds, None, valid, kind, greedy.shape[1]), greedy)
    if kind == LATENT:
        quirk = net.generate(tokens, kinds, None, valid, kind, 4, official_eos=True)
        assert torch.equal(quirk, golden["gen.official_generate"].long())


@pytest.mark.parametrize("folder", ["vla", "vla_action"])
def test_all_layouts_give_identical_weights(folder):
    first, *others = (load(f"{folder}/{name}").state_dict() for name in LAYOUTS)
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_rounded_rotary_table_is_what_official_bf16_needs():
    net, long = load("vla/params"), arrays("vla/golden_long.npz")
    tokens, gap = long["input_ids"].long(), {}
    for net.config.rounded_rope in (False, True):
        with torch.no_grad():
            logits = net.score(net(tokens, torch.zeros_like(tokens))[:, -32:], TEXT)
        gap[net.config.rounded_rope] = (logits - long["bf16.lm_logits_last32"]).abs().mean()
        if not net.config.rounded_rope:
            torch.testing.assert_close(logits, long["fp32.lm_logits_last32"], rtol=0, atol=1e-4)
    assert gap[True] <= 0.03 and gap[False] > 0.3
    table = arrays("vla/rope_tables.npz")
    half = torch.arange(0, 128, 2).float()
    angle = torch.arange(400)[:, None] * 5e7 ** (-half / 128)
    for found, name in zip(model.rope_table(angle, True), ("cos", "sin")):
        assert torch.equal(found, table[f"bf16.dim128.{name}"])


@pytest.mark.parametrize(
    "folder, loss_of",
    [
        ("vla", lambda net, rows: pretrain.loss_of(net, rows, LATENT, official_text_mask=True)[0]),
        ("vla_action", lambda net, rows: finetune.loss_of(net, rows, 0.0)[0]),
    ],
)
def test_three_official_training_steps(folder, loss_of):
    net, known = load(f"{folder}/params"), info(folder)
    rows = rows_of(arrays(f"{folder}/inputs.npz"))
    c = pretrain.PretrainConfig(data="", out="", steps=3)
    optimizer = common.make_optimizer(
        net.parameter_groups(2e-5, 1.0, (), False), betas=(0.9, 0.95), weight_decay=0.0
    )
    for step, golden in enumerate(known["train_metrics_fp32"]):
        loss = loss_of(net, rows)
        assert loss.item() == pytest.approx(golden["loss"], abs=1e-5 if step == 0 else 1e-4)
        loss.backward()
        if step == 0:
            norms = {}
            for name, p in net.named_parameters():
                theirs = convert.official_name(name, tuple(p.shape), scanned=2)[0]
                grad = 0.0 if p.grad is None else float(p.grad.norm())
                norms[theirs] = (norms.get(theirs, 0) ** 2 + grad**2) ** 0.5
            for name, norm in known["grad_l2"].items():
                assert norms[name] == pytest.approx(norm, rel=1e-3, abs=1e-7), name
        norm = common.optimizer_step(optimizer, common.Processes(), c, step)
        assert norm == pytest.approx(golden["gradient_norm"], rel=1e-4)


# ---------------------------------------------------------------- sequences
class Recorded:
    """A tokenizer that knows the recorded strings"""

    def __init__(self):
        self.ids = json.loads((FIXTURES / "seq/token_ids.json").read_text())["ids"]

    def encode(self, text, add_special_tokens=False):
        ids = self.ids[text]
        return type("Encoding", (), {"ids": ids})


@pytest.mark.parametrize(
    "stage, kind, field", [("pretrain", LATENT, "delta"), ("finetune", ACTION, "action")]
)
def test_rows_equal_the_official_ones(stage, kind, field):
    golden = arrays("seq/golden.npz")
    text = (FIXTURES / f"seq/{stage}.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    builder = sequences.Sequences(Recorded(), 257, "{instruction}", 384, official_cut=True)
    codes = torch.tensor([line["vision"][:256] for line in lines])  # the first picture
    answers = [[int(code) for code in line[field]] for line in lines]
    rows = builder.rows([line["instruction"] for line in lines], answers, kind, codes)
    assert torch.equal(rows["tokens"], golden[f"{stage}.input_tokens"].long())
    assert torch.equal(rows["targets"], golden[f"{stage}.target_tokens"].long())
    assert torch.equal(rows["mask"], golden[f"{stage}.loss_masks"] > 0)
    for side, found in (("input", rows["kinds"]), ("target", rows["target_kinds"])):
        for which in (VISION, LATENT, ACTION):
            known = golden.get(f"{stage}.{side}_{LOGITS[which]}_masks")
            assert known is None or torch.equal(found == which, known)
    builder.official_cut = False  # ours: the mask stays with its tokens
    mask = builder.rows([lines[3]["instruction"]], answers[3:], kind, codes[3:])["mask"][0]
    whole = golden[f"{stage}.example3.loss_mask"].bool()
    assert torch.equal(mask, whole[1:385]) and not torch.equal(mask, rows["mask"][3])


def test_whole_official_sampler():
    """Camera picture and prompt -> codes -> the 391-token batch -> first logits and greedy codes"""
    golden, known = arrays("e2e/golden.npz"), info("e2e")
    config, pairs = convert.from_stream(
        FIXTURES / "e2e/params",
        convert.ConvertConfig(
            source=[], out="", heads=known["llama"]["num_attention_heads"], rounded_rope=False
        ),
    )
    net, vqgan = VLA(config), load_vqgan("e2e")
    common.load_strictly(net, {name: read() for name, read in pairs})
    builder = sequences.Sequences(None, config.image_tokens, sequences.OFFICIAL_TEMPLATE)
    tags = {
        "<vision>": [529, 4924, 29958],
        "</vision>": [1533, 4924, 29958],
        "<delta>": [529, 4181, 29958],
    }
    for i, question in enumerate(known["questions"]):
        frame = data.official_resize(golden[f"image{i}"].numpy(), 256)
        assert np.array_equal(frame, golden["frames_u8"][i])
        batch = {
            name: golden[f"batch{i}.{name}"]
            for name in ("input_ids", "attention_mask", "vision_masks")
        }
        ids = batch["input_ids"][0, :128][batch["attention_mask"][0, :128].bool()].tolist()
        words = {**tags, sequences.OFFICIAL_TEMPLATE.format(instruction=question): ids[1:-3]}
        builder.words = words.__getitem__
        codes = vqgan.encode(data.to_float(frame[None]) * 2 - 1)
        tokens, kinds, valid = builder.prompts([question], LATENT, codes, multiple=391)
        assert torch.equal(tokens, batch["input_ids"])
        assert torch.equal(valid, batch["attention_mask"].bool())
        assert torch.equal(kinds == VISION, batch["vision_masks"])
        with torch.no_grad():
            logits = net.score(net(tokens, kinds, valid=valid)[:, -1], LATENT)
        torch.testing.assert_close(logits, golden[f"first_delta_logits{i}"], rtol=0, atol=1e-4)
        quirk = net.generate(tokens, kinds, None, valid, LATENT, 4, official_eos=True)
        assert torch.equal(quirk, golden[f"delta{i}"].long())


# ---------------------------------------------------------------- files
def test_hugging_face_layout_both_ways(inside, tmp_path):
    batch, golden = arrays("vla/inputs.npz"), arrays("vla/golden_fp32.npz")
    source = FIXTURES / "vla/hf_text_model.safetensors"
    assert inside("-m", "official.convert", source, tmp_path / "ours", "--heads", 4) == 0
    weights, meta = common.load_checkpoint(tmp_path / "ours", "x", ("pretrain",))
    net = VLA(VLAConfig(**meta["model"]))
    common.load_strictly(net, weights)
    text = batch["text.input_ids"].long()
    hidden = net(text, torch.zeros_like(text))
    torch.testing.assert_close(net.score(hidden, TEXT), golden["text.lm_logits"], rtol=0, atol=1e-4)
    assert inside("-m", "official.convert", tmp_path / "ours", tmp_path / "hf", "--to", "hf") == 0
    found, first = load_file(tmp_path / "hf/model.safetensors"), load_file(source)
    assert found.keys() == first.keys()
    assert all(torch.equal(found[name], first[name]) for name in first)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    known = json.loads((FIXTURES / "vla/hf_text_config.json").read_text())
    assert {k: config[k] for k in known if k != "max_position_embeddings"} == {
        k: v for k, v in known.items() if k != "max_position_embeddings"
    }
    # A folder of shards with an index, as large models come.
    names = sorted(first)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    (tmp_path / "shards").mkdir()
    for file, part in shards.items():
        common.save_file({n: first[n] for n in part}, tmp_path / "shards" / file)
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    (tmp_path / "shards/model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(FIXTURES / "vla/hf_text_config.json", tmp_path / "shards/config.json")
    assert inside("-m", "official.convert", tmp_path / "shards", tmp_path / "again") == 0
    again, _ = common.load_checkpoint(tmp_path / "again", "x", ("pretrain",))
    assert all(torch.equal(again[name][:], weights[name][:]) for name in weights)


def test_exported_files_run_in_transformers(inside, tmp_path):
    transformers = pytest.importorskip("transformers")
    batch, golden = arrays("vla/inputs.npz"), arrays("vla/golden_fp32.npz")
    assert (
        inside("-m", "official.convert", FIXTURES / "vla/params", tmp_path / "ours", "--heads", 4)
        == 0
    )
    assert inside("-m", "official.convert", tmp_path / "ours", tmp_path / "hf", "--to", "hf") == 0
    net = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        logits = net(batch["text.input_ids"].long()).logits
    torch.testing.assert_close(logits, golden["text.lm_logits"], rtol=0, atol=1e-4)


def test_chunks_are_joined_by_number(tmp_path):
    """However their map is sorted: where the first two have changed names, they change places"""
    source = FIXTURES / "vla/params_chunked"
    table, blob = convert.read_stream(source), bytearray(source.read_bytes())
    name, pieces = next((n, pieces) for n, (_, _, pieces) in table.items() if len(pieces) > 1)
    blob[blob.rindex(b"\xa10", 0, pieces[0].start) + 1] = ord("1")
    blob[pieces[0].stop + 1] = ord("0")
    (tmp_path / "params").write_bytes(blob)
    found = convert.read_stream(tmp_path / "params")[name][2]
    assert found == [pieces[1], pieces[0], *pieces[2:]]


def test_large_checkpoints_are_written_in_shards(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    common.save_weights(tmp_path, tensors.items(), shard=80)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)
    ] + ["model.safetensors.index.json"]
    found = {n: t for f in common.weight_files(tmp_path) for n, t in load_file(f).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def write_params(path, dim, mlp, layers):
    """A params stream of a small vocabulary and zeros -> bytes of its largest tensor"""
    text = lambda s: bytes([0xD9, len(s)]) + s.encode()
    largest = 0
    with open(path, "wb") as file:
        for key, dims in (
            ("transformer/wte/embedding", (320, dim)),
            ("lm_head/kernel", (dim, 320)),
            ("transformer/vte/embedding", (320, dim)),
            ("vision_head/kernel", (dim, 320)),
            ("transformer/ln_f/kernel", (dim,)),
            *(
                (f"transformer/h/scan_decoder/attention/w{w}/kernel", (layers, dim, dim))
                for w in "qkvo"
            ),
            *(
                (
                    f"transformer/h/scan_decoder/feed_forward/w{w}/kernel",
                    (layers, mlp, dim) if w == 2 else (layers, dim, mlp),
                )
                for w in (1, 2, 3)
            ),
            *(
                (f"transformer/h/scan_decoder/{part}_norm/kernel", (layers, dim))
                for part in ("attention", "ffn")
            ),
        ):
            size = 2 * int(np.prod(dims))
            head = (
                b"\x93"
                + bytes([0x90 + len(dims)])
                + b"".join(b"\xcd" + n.to_bytes(2, "big") for n in dims)
            )
            head += text("bfloat16") + b"\xc6" + size.to_bytes(4, "big")
            ext = b"\xc9" + (len(head) + size).to_bytes(4, "big") + b"\x01"
            words = key.split("/")
            file.write(
                b"\x92"
                + bytes([0x90 + len(words)])
                + b"".join(map(text, words))
                + b"\xc6"
                + (len(ext + head) + size).to_bytes(4, "big")
                + ext
                + head
            )
            file.write(bytes(size))
            largest = max(largest, size)
    return largest


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


def entries(path):
    """A params file as [(name, begin, end)] of its tensors' messages"""
    table, blob = convert.read_stream(path), path.read_bytes()
    found, begin = [], 0
    for name, (_, _, pieces) in table.items():
        end = pieces[-1].stop
        found.append((name, begin, end))
        begin = end
    assert end == len(blob)
    return found, blob


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_broken_stream_is_refused_by_the_tensor_and_leaves_nothing(
    layout, inside, tmp_path, capsys
):
    found, blob = entries(FIXTURES / "vla" / layout)
    whole = tmp_path / "whole"
    whole.write_bytes(blob)
    name, begin, end = found[len(found) // 2]
    second, after = found[len(found) // 2 + 1][1:]
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
        assert inside("-m", "official.convert", source, tmp_path / "out", "--heads", 4) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {source}: ") and said in error
        assert sorted(p.name for p in tmp_path.iterdir()) == ["params", "whole"]
    assert inside("-m", "official.convert", whole, tmp_path / "out", "--heads", 4) == 0


def test_a_wrong_shape_is_refused_by_name(inside, tmp_path, capsys):
    weights = load_file(FIXTURES / "vla/hf_text_model.safetensors")
    for name, change in (
        (
            "model.layers.1.mlp.up_proj.weight",
            lambda w, n: w.update({n: w[n][:, :63].contiguous()}),
        ),
        ("model.norm.weight", lambda w, n: w.pop(n)),
        ("stray.weight", lambda w, n: w.update({n: torch.ones(2)})),
    ):
        changed = dict(weights)
        change(changed, name)
        common.save_file(changed, tmp_path / "x.safetensors")
        assert (
            inside(
                "-m",
                "official.convert",
                tmp_path / "x.safetensors",
                tmp_path / "o",
                "--heads",
                4,
                "--code_len",
                4,
            )
            == 2
        )
        assert name in capsys.readouterr().err and not (tmp_path / "o").exists()


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_pickles_may_hold_arrays_only(inside, tmp_path, capsys):
    with open(FIXTURES / "vqgan/vqgan", "rb") as file:
        good = pickle.load(file)
    source = tmp_path / "vqgan"
    del_one = {**good, "quant_conv": {"kernel": good["quant_conv"]["kernel"]}}
    for content, said in (
        (pickle.dumps({**good, "x": Evil()}), "pathlib"),
        (pickle.dumps(good)[:-2000], "not a whole pickle"),
        (b"\x80\x04junk", "pickle"),
        (pickle.dumps({**good, "x": np.ones(2)}), "unexpected: x"),
        (pickle.dumps({**good, "x": "text"}), "x: str"),
        (pickle.dumps(del_one), "missing: quant_conv/bias"),
        (
            pickle.dumps({**good, "quant_conv": {**good["quant_conv"], "bias": np.ones(3)}}),
            "quant_conv/bias (3,)",
        ),
    ):
        source.write_bytes(content)
        assert inside("-m", "official.convert", source, tmp_path / "out") == 2
        assert said in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == ["vqgan"]
    for protocol in range(6):  # as written by any Python
        source.write_bytes(pickle.dumps({"params": good}, protocol))
        assert len(convert.read_pickle(source)) == len(info("vqgan")["keys"])


def test_official_weights_through_every_stage(inside, make_dataset, tmp_path, capsys):
    """Convert, pretrain, finetune, predict: a small official model on a dataset of ours"""
    root = make_dataset({"a": 6, "b": 5}, size=40)
    tokenizer = sequences.train_tokenizer(["push it", sequences.OFFICIAL_TEMPLATE])
    tokenizer.save(str(root / "tokenizer.json"))
    laq = ("--preset", "tiny", "--steps", 2, "--batch", 2, "--held_out", 1)
    assert inside("quantize.py", "--data", root, "--out", tmp_path / "laq", *laq) == 0
    found, blob = entries(FIXTURES / "e2e/params")  # LWM itself knows no latent actions
    (tmp_path / "params").write_bytes(
        b"".join(
            blob[begin:end]
            for name, begin, end in found
            if "dte" not in name and "delta" not in name
        )
    )
    for params, out in ((FIXTURES / "e2e/params", "lapa7b"), (tmp_path / "params", "lwm")):
        assert (
            inside(
                "-m",
                "official.convert",
                params,
                FIXTURES / "e2e/vqgan",
                root / "tokenizer.json",
                tmp_path / out,
                "--heads",
                2,
            )
            == 0
        )
    few = ("--preset", "lapa", "--steps", 2, "--batch", 2, "--held_out", 1, "--data", root)
    assert (
        inside(
            "pretrain.py",
            *few,
            "--laq",
            tmp_path / "laq",
            "--init_from",
            tmp_path / "lwm",
            "--out",
            tmp_path / "lapa",
            "--official_text_mask",
            "true",
        )
        == 0
    )
    (codes,) = (tmp_path / "cache").glob("codes_*/*.bin")
    assert codes.stat().st_size == (5 + 6) * 256 * 2
    assert "fresh: latent_embed.weight, latent_head.weight\n" in capsys.readouterr().out
    for shift in (0, 0.1):
        assert (
            inside(
                "finetune.py",
                *few,
                "--init_from",
                tmp_path / "lapa",
                "--shift",
                shift,
                "--out",
                tmp_path / f"robot{shift}",
            )
            == 0
        )
    picture = tmp_path / "x.png"
    evaluate.Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(picture)
    for run, said, n in (
        ("lapa7b", "latent action: [", 4),
        ("lapa", "latent action: [", 4),
        ("robot0", "action: [", 2),
    ):
        capsys.readouterr()
        assert (
            inside(
                "evaluate.py",
                "predict",
                "--policy",
                tmp_path / run,
                "--image",
                picture,
                "--instruction",
                "push it",
            )
            == 0
        )
        out = capsys.readouterr().out
        assert out.startswith(said) and out.split("]")[0].count(",") == n - 1
    assert (
        inside(
            "evaluate.py",
            "predict",
            "--policy",
            tmp_path / "lapa",
            "--image",
            tmp_path / "none.png",
            "--instruction",
            "push it",
        )
        == 2
    )


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
    ours = convert.Tokenizer.from_str(convert.tokenizer_from(tmp_path / "t.model"))
    more = ["  two  blanks ", "unseen Words 日本", "<vision>", "pushpushpush the the"]
    for text in texts + more:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text
    body = theirs.encode("push the red block")
    assert ours.encode("<s> <s> push the red block", add_special_tokens=False).ids == [1, 1, *body]


def test_weights_that_do_not_belong_together_are_refused(inside, tmp_path, capsys):
    e2e, small = FIXTURES / "e2e", FIXTURES / "vla_action"
    picture = tmp_path / "x.png"
    evaluate.Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(picture)
    tokenizer = sequences.train_tokenizer(["push it", sequences.OFFICIAL_TEMPLATE])
    tokenizer.save(str(tmp_path / "blob"))
    (tmp_path / "links").mkdir()
    (tmp_path / "links/tokenizer.json").symlink_to("../blob")  # as in Hugging Face's cache
    out = tmp_path / "out"

    def refused(code, *words):
        said = capsys.readouterr().err.split("\r")[-1]
        assert code == 2 and all(w in said for w in words) and said.count("\n") == 1, said
        assert not out.exists() and not list(tmp_path.glob(".*"))

    text = FIXTURES / "vla/hf_text_model.safetensors"
    sources = e2e / "params", FIXTURES / "vqgan/vqgan", tmp_path / "links/tokenizer.json"
    assert inside("-m", "official.convert", *sources, tmp_path / "other", "--heads", 2) == 0
    assert json.loads((tmp_path / "other/tokenizer.json").read_text())
    assert (
        inside(
            "-m",
            "official.convert",
            text,
            tmp_path / "links/tokenizer.json",
            tmp_path / "text",
            "--heads",
            4,
        )
        == 0
    )
    ask = ("evaluate.py", "predict", "--image", picture, "--instruction", "push it", "--policy")
    assert (
        inside(
            "-m",
            "official.convert",
            e2e / "params",
            e2e / "vqgan",
            tmp_path / "links/tokenizer.json",
            tmp_path / "whole",
            "--heads",
            2,
        )
        == 0
    )
    capsys.readouterr()
    levels = len(json.loads((tmp_path / "other/config.json").read_text())["vqgan"]["multipliers"])
    assert levels == 3  # the patch is the VQGAN's: 4 pixels, not 16 as in e2e
    meta = json.loads((tmp_path / "other/config.json").read_text())
    assert meta["model"]["patch_size"] == 2 ** (levels - 1)
    shutil.copy(tmp_path / "other/vqgan.safetensors", tmp_path / "whole")
    whole = json.loads((tmp_path / "whole/config.json").read_text())
    (tmp_path / "whole/config.json").write_text(json.dumps({**whole, "vqgan": meta["vqgan"]}))
    refused(inside(*ask, tmp_path / "whole"), "pixels each do not fit")
    refused(inside(*ask, tmp_path / "text"), "predicts neither latent nor robot")
    refused(
        inside("-m", "official.convert", e2e / "params", text, out, "--heads", 2),
        "among them, found 2",
    )
    refused(inside("-m", "official.convert", tmp_path / "blob", out), "blob")
    for content, words in (
        ("0,1\n1,0\n", "row 0"),
        ("0,1\n", "-1 action bins"),
        ("0,1\n1,nan\n", "row 0"),
        ("0,1\n0.5,1\n\n", "row 1"),
    ):
        (tmp_path / "bins.csv").write_text(content)
        refused(
            inside(
                "-m", "official.convert", small / "params", tmp_path / "bins.csv", out, "--heads", 4
            ),
            words,
        )
    (tmp_path / "bins.csv").write_text(",0,1,2\n0,-1,0,1\n1,-2,2,\n")
    refused(
        inside("-m", "official.convert", e2e / "params", tmp_path / "bins.csv", out, "--heads", 2),
        "2 act",
    )
    assert (
        inside("-m", "official.convert", small / "params", tmp_path / "bins.csv", out, "--heads", 4)
        == 0
    )
    meta = json.loads((out / "config.json").read_text())
    assert meta["bins"] == [[-1, 0, 1], [-2, 2]]


def test_wrong_shapes_name_the_wrong_tensor(inside, tmp_path, capsys):
    """Also where the configuration is read off it"""
    weights = load_file(FIXTURES / "vla/hf_text_model.safetensors")
    laq = load_file(FIXTURES / "laq_small/model.safetensors")
    with open(FIXTURES / "vqgan/vqgan", "rb") as file:
        pickled = pickle.load(file)
    embed = "to_patch_emb_first_frame"
    for tensors, name in (
        (weights, "model.embed_tokens.weight"),
        (weights, "model.norm.weight"),
        (weights, "model.layers.0.mlp.gate_proj.weight"),
        (laq, f"{embed}.2.weight"),
        (laq, "spatial_rel_pos_bias.net.2.weight"),
        (laq, "vq.project_in.weight"),
        (laq, "vq.cnn_encoder.2.weight"),
        (laq, f"{embed}.1.weight"),
        (laq, "enc_spatial_transformer.norm_out.beta"),
    ):
        more = torch.cat((tensors[name], tensors[name][:1]))
        common.save_file({**tensors, name: more}, tmp_path / "x.safetensors")
        assert (
            inside(
                "-m",
                "official.convert",
                tmp_path / "x.safetensors",
                tmp_path / "o",
                "--heads",
                4,
                "--code_len",
                4,
            )
            == 2
        )
        assert name in capsys.readouterr().err and not (tmp_path / "o").exists()
    for part in ("Conv_0", "Conv_1"):
        kernel = pickled["encoder"][part]["kernel"]
        wider = np.concatenate((kernel, kernel[..., :1]), -1)
        wrong = {**pickled["encoder"][part], "kernel": wider}
        (tmp_path / "vqgan").write_bytes(
            pickle.dumps({**pickled, "encoder": {**pickled["encoder"], part: wrong}})
        )
        assert inside("-m", "official.convert", tmp_path / "vqgan", tmp_path / "o") == 2
        assert f"encoder/{part}/kernel" in capsys.readouterr().err
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    assert inside("-m", "official.convert", tmp_path / "evil.pt", tmp_path / "o") == 2
    assert "it wants getattr" in (said := capsys.readouterr().err) and said.count("\n") == 1
