"""Our networks and token rows against recordings of the official code (recordings.md)."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from recordings import arrays, load_laq, load_vla, load_vqgan, recording, values
from torch import Tensor

import data
import finetune
import model
import pretrain
import sequences
import training
from model import ACTION, LAQ, LATENT, TEXT, VISION, VLA, LAQConfig, VLAConfig
from official.laq import LAQ_NAMES
from official.tensors import rename
from official.vla import stream_counterpart
from official.vqgan import VQGAN, VQGAN_NAMES, VQGANConfig

VLAS = "vla", "vla_action"
OFFICIAL_WORDS = {TEXT: "lm", VISION: "vision", LATENT: "delta", ACTION: "action"}


# ---------------------------------------------------------------- LAQ
@pytest.fixture(scope="module")
def laq_golden() -> dict[str, Tensor]:
    """With `pair` and `codes`, what a LAQ reads and says"""
    golden = arrays("laq/golden.npz")
    golden["pair"] = data.to_float(golden["video_u8"].numpy())
    golden["codes"] = golden["indices"].long()
    return golden


def test_laq_gives_the_official_outputs(laq_golden):
    net, pair, codes = load_laq(recording("laq/laq.pt")), laq_golden["pair"], laq_golden["codes"]
    assert torch.equal(net.label(pair), codes)
    users = (3 * torch.arange(codes.numel()) + 1).remainder(8).view_as(codes)
    for found, name in (
        (net.difference(pair), "d"),
        (net.imagine(pair[:, 0], codes), "recon"),
        (net.imagine(pair[:, 0], users), "recon_user"),
        (net.quantizer.tokens(net.quantizer.codebook[codes]), "action_tokens"),
    ):
        torch.testing.assert_close(found, laq_golden[name], rtol=0, atol=1e-5)


def test_laq_training_pass_gives_the_official_loss_and_gradients(laq_golden):
    net, info = load_laq(recording("laq/laq.pt")), values("laq/info.json")
    loss, _, _ = net(laq_golden["pair"], noise=laq_golden["train_noise"])
    assert abs(loss.item() - float(laq_golden["train_loss"])) < 1e-6
    loss.backward()
    found = {rename(name, LAQ_NAMES): p.grad for name, p in net.named_parameters()}
    unused = info["params_without_grad"]
    assert all(found[name] is None for name in unused)
    # A bias that cancels (under softmax, in a difference) has a gradient of rounding noise: 1e-7.
    for name, norm in info["grad_l2"].items():
        if norm and name not in unused:  # 0: the zero-size null_kv
            assert float(found[name].norm()) == pytest.approx(norm, rel=1e-4, abs=1e-7), name
    for name, grad in arrays("laq/train_grads.npz").items():
        if grad.numel() and name not in unused:
            assert (found[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name


# ---------------------------------------------------------------- VQGAN
def test_vqgan_gives_the_official_codes_and_pictures():
    net, golden = load_vqgan(recording("vqgan/vqgan")), arrays("vqgan/golden.npz")
    codes = net.encode(golden["pixel_values"].permute(0, 3, 1, 2))
    assert torch.equal(codes, golden["indices"].flatten(1).long())
    torch.testing.assert_close(
        net.decode(codes).permute(0, 2, 3, 1), golden["recon"], rtol=0, atol=1e-4
    )


# ---------------------------------------------------------------- VLA
def read_kinds(batch: dict[str, Tensor], prefix: str, tokens: Tensor) -> Tensor:
    """The official masks of a batch -> the vocabulary of each position, int64 [B, L]"""
    kinds = torch.zeros_like(tokens).long()
    for kind, word in OFFICIAL_WORDS.items():
        mask = batch.get(f"{prefix}{word}_masks")
        if mask is not None:
            kinds[mask.bool()] = kind
    return kinds


def read_rows(batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The official training batch as Sequences.rows gives it"""
    tokens = batch["train.input_tokens"].long()
    return {
        "tokens": tokens,
        "targets": batch["train.target_tokens"].long(),
        "images": None,
        "kinds": read_kinds(batch, "train.input_", tokens),
        "target_kinds": read_kinds(batch, "train.target_", tokens),
        "mask": batch["train.loss_masks"] > 0,
    }


def assert_logits(
    net: VLA,
    hidden: Tensor,
    golden: dict[str, Tensor],
    prefix: str,
    where: Tensor | slice = slice(None),
) -> None:
    """Logits of all vocabularies within 1e-4 of the recorded ones, at the places `where`"""
    for kind in net.vocabularies():
        known = golden[f"{prefix}.{OFFICIAL_WORDS[kind]}_logits"]
        found = net.score(hidden, kind)
        torch.testing.assert_close(found[where], known[where], rtol=0, atol=1e-4)


@pytest.mark.parametrize("folder", VLAS)
def test_vla_gives_the_official_logits_and_codes(folder):
    net = load_vla(recording(f"{folder}/params"))
    batch, golden = arrays(f"{folder}/inputs.npz"), arrays(f"{folder}/golden_fp32.npz")
    rows = read_rows(batch)
    assert_logits(net, net(rows["tokens"], rows["kinds"]), golden, "train")
    tokens, valid = batch["prefill.input_ids"].long(), batch["prefill.attention_mask"].bool()
    kinds = read_kinds(batch, "prefill.", tokens)
    assert_logits(net, net(tokens, kinds, valid=valid), golden, "prefill", valid)
    text = batch["text.input_ids"].long()
    assert_logits(net, net(text, torch.zeros_like(text)), golden, "text")
    kind = ACTION if folder == "vla_action" else LATENT
    greedy = golden["gen.greedy_tokens"].long()
    assert torch.equal(net.generate(tokens, kinds, None, valid, kind, greedy.shape[1]), greedy)
    if kind == LATENT:
        quirk = net.generate(tokens, kinds, None, valid, kind, 4, official_eos=True)
        assert torch.equal(quirk, golden["gen.official_generate"].long())


def test_rounded_rotary_table_is_what_official_bf16_needs():
    net, golden = load_vla(recording("vla/params")), arrays("vla/golden_long.npz")
    tokens, gap = golden["input_ids"].long(), {}
    for net.config.rounded_rope in (False, True):
        with torch.no_grad():
            logits = net.score(net(tokens, torch.zeros_like(tokens))[:, -32:], TEXT)
        gap[net.config.rounded_rope] = (logits - golden["bf16.lm_logits_last32"]).abs().mean()
        if not net.config.rounded_rope:
            torch.testing.assert_close(logits, golden["fp32.lm_logits_last32"], rtol=0, atol=1e-4)
    assert gap[True] <= 0.03 and gap[False] > 0.3
    table = arrays("vla/rope_tables.npz")
    half = torch.arange(0, 128, 2).float()
    angle = torch.arange(400)[:, None] * 5e7 ** (-half / 128)
    cos, sin = model.vla.rope_table(angle, True)
    assert torch.equal(cos, table["bf16.dim128.cos"])
    assert torch.equal(sin, table["bf16.dim128.sin"])


def pretraining_loss(net: VLA, rows: dict[str, Tensor | None]) -> Tensor:
    return pretrain.loss_of(net, rows, LATENT, official_text_mask=True)[0]


def finetuning_loss(net: VLA, rows: dict[str, Tensor | None]) -> Tensor:
    return finetune.loss_of(net, rows, 0.0)[0]


def official_gradient_norms(net: VLA, layers: int) -> dict[str, float]:
    """Norms by the official names, under which all layers lie in one tensor"""
    squares = {}
    for name, p in net.named_parameters():
        official = stream_counterpart(name, tuple(p.shape), scanned_layers=layers).name
        square = 0.0 if p.grad is None else float(p.grad.norm()) ** 2
        squares[official] = squares.get(official, 0.0) + square
    return {name: square**0.5 for name, square in squares.items()}


@pytest.mark.parametrize(
    "folder, loss_of", [("vla", pretraining_loss), ("vla_action", finetuning_loss)]
)
def test_three_official_training_steps(folder: str, loss_of: Callable[..., Tensor]):
    net, info = load_vla(recording(f"{folder}/params")), values(f"{folder}/info.json")
    rows = read_rows(arrays(f"{folder}/inputs.npz"))
    optimizer = training.make_optimizer(
        net.parameter_groups(2e-5, 1.0, ()), betas=(0.9, 0.95), weight_decay=0.0
    )
    for step, golden in enumerate(info["train_metrics_fp32"]):
        loss = loss_of(net, rows)
        assert loss.item() == pytest.approx(golden["loss"], abs=1e-5 if step == 0 else 1e-4)
        loss.backward()
        if step == 0:
            found = official_gradient_norms(net, net.config.layers)
            for name, norm in info["grad_l2"].items():
                assert found[name] == pytest.approx(norm, rel=1e-3, abs=1e-7), name
        norm = training.Processes().clip_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        assert norm == pytest.approx(golden["gradient_norm"], rel=1e-4)


# ---------------------------------------------------------------- sequences
class Recorded:
    """A tokenizer that knows the recorded strings"""

    def __init__(self) -> None:
        self.ids = values("sequences/token_ids.json")["ids"]

    def encode(self, text: str, add_special_tokens: bool = False) -> object:
        ids = self.ids[text]
        return type("Encoding", (), {"ids": ids})


@pytest.mark.parametrize(
    "stage, kind, field", [("pretrain", LATENT, "delta"), ("finetune", ACTION, "action")]
)
def test_rows_equal_the_official_ones(stage, kind, field):
    golden = arrays("sequences/golden.npz")
    text = recording(f"sequences/{stage}.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    codes = torch.tensor([line["vision"][:256] for line in lines])  # the first picture
    answers = [[int(code) for code in line[field]] for line in lines]
    builder = sequences.Sequences(Recorded(), 257, "{instruction}", 384, official_cut=True)
    rows = builder.rows([line["instruction"] for line in lines], answers, kind, codes)
    assert torch.equal(rows["tokens"], golden[f"{stage}.input_tokens"].long())
    assert torch.equal(rows["targets"], golden[f"{stage}.target_tokens"].long())
    assert torch.equal(rows["mask"], golden[f"{stage}.loss_masks"] > 0)
    for side, found in (("input", rows["kinds"]), ("target", rows["target_kinds"])):
        for vocabulary in (VISION, LATENT, ACTION):
            known = golden.get(f"{stage}.{side}_{OFFICIAL_WORDS[vocabulary]}_masks")
            assert known is None or torch.equal(found == vocabulary, known)
    builder.official_cut = False  # ours: the mask stays with its tokens
    mask = builder.rows([lines[3]["instruction"]], answers[3:], kind, codes[3:])["mask"][0]
    uncut = golden[f"{stage}.example3.loss_mask"].bool()
    assert torch.equal(mask, uncut[1:385]) and not torch.equal(mask, rows["mask"][3])


# ---------------------------------------------------------------- from camera picture to answer
def test_whole_official_sampler():
    """Camera picture and prompt -> codes -> the 391-token batch -> first logits and greedy codes"""
    golden, info = arrays("sampler/golden.npz"), values("sampler/info.json")
    net = load_vla(recording("sampler/params"), info["llama"]["num_attention_heads"])
    vqgan = load_vqgan(recording("sampler/vqgan"))
    builder = sequences.Sequences(None, net.config.image_tokens, sequences.OFFICIAL_TEMPLATE)
    tags = {
        "<vision>": [529, 4924, 29958],
        "</vision>": [1533, 4924, 29958],
        "<delta>": [529, 4181, 29958],
    }
    for i, question in enumerate(info["questions"]):
        frame = data.official_resize(golden[f"image{i}"].numpy(), 256)
        assert np.array_equal(frame, golden["frames_u8"][i])
        input_ids = golden[f"batch{i}.input_ids"]
        attention_mask = golden[f"batch{i}.attention_mask"].bool()
        ids = input_ids[0, :128][attention_mask[0, :128]].tolist()
        words = {**tags, sequences.OFFICIAL_TEMPLATE.format(instruction=question): ids[1:-3]}
        builder.words = words.__getitem__
        codes = vqgan.encode(data.to_float(frame[None]) * 2 - 1)
        tokens, kinds, valid = builder.prompts([question], LATENT, codes, multiple=391)
        assert torch.equal(tokens, input_ids)
        assert torch.equal(valid, attention_mask)
        assert torch.equal(kinds == VISION, golden[f"batch{i}.vision_masks"])
        with torch.no_grad():
            logits = net.score(net(tokens, kinds, valid=valid)[:, -1], LATENT)
        torch.testing.assert_close(logits, golden[f"first_delta_logits{i}"], rtol=0, atol=1e-4)
        quirk = net.generate(tokens, kinds, None, valid, LATENT, 4, official_eos=True)
        assert torch.equal(quirk, golden[f"delta{i}"].long())


# ---------------------------------------------------------------- full size
def test_full_size_laq_has_the_official_tensors():
    with torch.device("meta"):
        net = LAQ(LAQConfig())
    assert sum(p.numel() for p in net.parameters()) == 343_796_080
    found = {name: list(tensor.shape) for name, tensor in net.state_dict().items()}
    assert found.pop("quantizer.uses") == [8]  # ours
    assert {rename(name, LAQ_NAMES): shape for name, shape in found.items()} == {
        name.removeprefix("module."): shape
        for name, shape in values("laq/full_config_keys.json").items()
        if not name.endswith(".beta") and 0 not in shape
    }


def test_full_size_vqgan_has_the_official_tensors():
    with torch.device("meta"):
        net = VQGAN(VQGANConfig())
    assert sum(p.numel() for p in net.parameters()) == 146_244_675
    found = {rename(name, VQGAN_NAMES): t.numel() for name, t in net.state_dict().items()}
    known = values("vqgan/full_config_keys.json")
    assert found == {name: int(np.prod(shape)) for name, shape in known.items()}


@pytest.mark.parametrize(
    "folder, action_vocab, count", [("vla", 0, 6_807_687_168), ("vla_action", 256, 6_809_784_320)]
)
def test_full_size_vla_has_the_official_tensors(folder, action_vocab, count):
    with torch.device("meta"):
        net = VLA(VLAConfig(action_vocab=action_vocab))
    assert sum(p.numel() for p in net.parameters()) == count
    found = {}
    for name, tensor in net.state_dict().items():
        official = stream_counterpart(name, tuple(tensor.shape), scanned_layers=32)
        found[official.name] = list(official.shape)
    assert found == values(f"{folder}/full_7b_keys.json")
