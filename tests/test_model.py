"""The two networks: the LAQ's codebook, and the VLA."""

import shutil
from dataclasses import fields
from pathlib import Path
from sysconfig import get_paths

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import common
import data
import finetune
import model
import pretrain
import quantize
import training
import sequences
from benchmarks.memory import finetuning_memory
from model import ACTION, LAQ, LATENT, TEXT, VISION, VLA, LAQConfig, VLAConfig, code_cnn, nearest
from simulators import tabletop

SMALL = dict(
    image_size=32,
    patch_size=8,
    dim=32,
    heads=4,
    dim_head=8,
    spatial_depth=1,
    temporal_depth=1,
    decoder_depth=1,
    quant_dim=8,
)


# ---------------------------------------------------------------- codebook and gradients
def test_substitute_keeps_the_distance_and_reaches_encoder_and_codebook():
    quantizer, d = model.Quantizer(LAQConfig(**SMALL)), torch.randn(6, 4, 8, requires_grad=True)
    gaps = (d[:, :, None] - quantizer.codebook).norm(dim=-1)
    indices = nearest(d, quantizer.codebook)
    assert torch.equal(indices, gaps.argmin(-1))
    value = quantizer.substitute(d, indices)
    torch.testing.assert_close((value - d).norm(dim=-1), gaps.min(-1).values)
    value.square().sum().backward()
    assert d.grad.norm() > 0 and quantizer.codebook.grad[indices.unique()].norm(dim=-1).min() > 0


@pytest.mark.parametrize("codes_matter", [True, False])
def test_decoder_does_not_shape_the_patch_embedding(codes_matter):
    """With codes that say nothing, only the decoder's own view of x_t could reach it: detached."""
    net = LAQ(LAQConfig(**SMALL))
    if not codes_matter:
        torch.nn.init.zeros_(net.quantizer.project_out.weight)
    net(torch.rand(2, 2, 3, 32, 32))[0].backward()
    for p in (
        *net.patch_embed.parameters(),
        net.quantizer.codebook,
        net.spatial_encoder.layers[0].attention.to_q.weight,
    ):
        assert p.grad.any() == codes_matter
    assert net.decoder.layers[0].attention.to_q.weight.grad.any()


@pytest.mark.parametrize("official_rule, expected", [(False, [3, 1]), (True, [1, 1])])
def test_every_use_counts_except_under_the_official_rule(official_rule, expected):
    quantizer = model.Quantizer(LAQConfig(**SMALL, official_counting=official_rule))
    before = quantizer.codebook.detach().clone()
    quantizer.count(torch.randn(1, 4, 8), torch.tensor([[3, 3, 3, 1]]))
    assert quantizer.uses[[3, 1]].tolist() == expected
    assert "uses" in quantizer.state_dict()  # resuming continues the count
    assert torch.equal(quantizer.codebook, before)  # unless it is pulled


def test_used_entries_are_pulled_to_the_mean_of_what_chose_them():
    quantizer, d = model.Quantizer(LAQConfig(**SMALL)), torch.randn(1, 4, 8)
    expected = quantizer.codebook.detach().clone()
    expected[3] = 0.8 * expected[3] + 0.2 * d[0, :3].mean(0)
    expected[1] = 0.8 * expected[1] + 0.2 * d[0, 3]
    quantizer.count(d, torch.tensor([[3, 3, 3, 1]]), pull=0.2)
    torch.testing.assert_close(quantizer.codebook.detach(), expected)


def test_dead_codes_land_on_encoder_outputs_of_the_batch():
    quantizer, d = model.Quantizer(LAQConfig(**SMALL)), torch.randn(16, 4, 8)
    before = quantizer.codebook.detach().clone()
    uses = torch.tensor([[0, 1, 2, 3]] * 20 + [[4, 0, 0, 0]])  # 4: under 10 % of a fair share
    quantizer.count(torch.zeros(21, 4, 8), uses)
    assert quantizer.replace_dead(torch.cat((d, before[:4].expand(4, 4, 8)))) == 4
    after = quantizer.codebook.detach()
    gaps = (d.flatten(0, 1)[:, None] - after[4:]).norm(dim=-1)
    assert torch.equal(after[:4], before[:4])
    assert gaps.min(0).values.max() == 0 and len(gaps.argmin(0).unique()) == 4
    assert quantizer.uses.sum() == 0


def test_codes_that_take_turns_far_from_the_data_are_dead():
    """All entries at one far point: each batch finds one of them, which then drifts, so that soon
    every entry was used.  A batch that uses a single code is collapsed all the same."""
    quantizer, d = model.Quantizer(LAQConfig(**SMALL)), torch.randn(16, 4, 8)
    quantizer.codebook.data.fill_(50.0)
    for i in range(48):
        quantizer.count(d, torch.full((16, 4), i % 8))
    quantizer.replace_dead(d)
    assert len(nearest(d, quantizer.codebook).unique()) >= 7


@pytest.mark.parametrize("official_rule", [False, True])
@pytest.mark.parametrize("first", [0, 1001])
def test_a_collapsed_codebook_heals(first, official_rule):
    """All entries are moved to one far point, at the start or late in training: within 200 steps a
    batch uses all 8 codes again.  The official rule never gets there."""
    env = tabletop.TableTop(64, size=32)
    frames = [env.reset(3)[0]["image"]]
    while len(frames) < 13:
        frames.append(env.step(env.expert(0.3))[0]["image"])
    c = quantize.QuantizeConfig(
        data="",
        out="",
        **{
            **quantize.PRESETS["tiny"],
            **SMALL,
            "official_counting": official_rule,
            "codebook_pull": 0.0,
            "batch": 16,
        },
    )
    torch.manual_seed(0)
    net = LAQ(LAQConfig(**{f.name: getattr(c, f.name) for f in fields(LAQConfig)}))
    net.quantizer.codebook.data.fill_(50.0)
    optimizer = quantize.make_optimizer(net, c.lr, c.codebook_lr)
    processes = training.start_processes()
    c.steps, most = 2000, 0
    for step in range(first, first + 200):
        rng = np.random.default_rng(step)
        t, table = rng.integers(10, size=16), rng.integers(64, size=16)
        pair = np.stack(frames)[[t, t + 3], table].swapaxes(0, 1)
        training.seed_step(c.seed, step)
        loss, d, indices = net(data.to_float(pair))
        loss.backward()
        training.set_learning_rate(optimizer, step, c.steps, c.warmup, c.final_lr)
        training.clip_gradients(optimizer, c.clip, processes)
        optimizer.step()
        optimizer.zero_grad()
        codes = quantize.update_codebook(net, d.detach(), indices, c, step, processes)
        most = max(most, codes)
        if most == 8:
            break
    assert (most == 8) != official_rule


def test_two_processes_train_one_checkpoint(start, make_dataset, tmp_path):
    folder, out = make_dataset({f"e{i}": 6 for i in range(4)}), tmp_path / "run"
    shape = [w for k, v in SMALL.items() for w in (f"--{k}", v)]
    done = start(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        "quantize.py",
        "--preset",
        "tiny",
        *shape,
        "--data",
        folder,
        "--held_out",
        1,
        "--out",
        out,
        "--steps",
        4,
        "--batch",
        8,
        "--log_every",
        1,
    )
    assert done.returncode == 0, done.stderr
    assert [p.name for p in out.glob("step_*")] == ["step_00000004"]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
    processes = training.Processes(rank=1, world=2, device=torch.device("cpu"))
    assert processes.local_rows(batch=8, accumulate=1) == slice(4, 8)
    with pytest.raises(SystemExit):
        processes.local_rows(batch=8, accumulate=3)


# ---------------------------------------------------------------- the VLA

SEQUENCES = sequences.Sequences(
    sequences.train_tokenizer(["push the red block left"]), image_tokens=4
)
TEXTS = ["push left", "push the red block left", "block"]


@pytest.fixture
def vla():
    torch.manual_seed(0)
    net = VLA(
        VLAConfig(
            dim=32,
            layers=2,
            heads=2,
            mlp=48,
            latent_vocab=8,
            action_vocab=16,
            text_vocab=SEQUENCES.tokenizer.get_vocab_size(),
            rope_theta=1e4,
            vision_vocab=0,
            image_size=16,
            patch_size=8,
        )
    )
    for p in net.parameters():
        p.data.mul_(8 if p.std() < 0.1 else 1)  # fresh weights are so small that all looks alike
    return net.eval()


@pytest.mark.parametrize("kind", [LATENT, ACTION, TEXT])
def test_generation_with_a_cache_equals_the_full_pass_with_and_without_padding(vla, kind):
    tokens, kinds, valid = SEQUENCES.prompts(TEXTS, kind)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    found = vla.generate(tokens, kinds, images, valid, kind, 5)
    whole = torch.cat((tokens, found), 1), torch.cat((kinds, torch.full_like(found, kind)), 1)
    hidden = vla(*whole, images, torch.cat((valid, found >= 0), 1))
    assert torch.equal(vla.score(hidden[:, -6:-1], kind).argmax(-1), found)
    for i, text in enumerate(TEXTS):
        tokens, kinds, valid = SEQUENCES.prompts([text], kind)
        alone = vla.generate(tokens, kinds, images[i : i + 1], valid, kind, 5)
        assert torch.equal(alone[0], found[i]), text
    assert len(found.unique()) > 1


def test_decoding_with_the_cache_gives_the_hidden_states_of_the_full_pass(vla):
    tokens, kinds, valid = SEQUENCES.prompts(TEXTS, ACTION)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    answer = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    whole = torch.cat((tokens, answer), 1), torch.cat((kinds, torch.full_like(answer, ACTION)), 1)
    valid = torch.cat((valid, answer > 0), 1)
    full = vla(*whole, images, valid)
    x, found, L = vla.embed(*whole, images), [], tokens.shape[1]
    tables = vla.tables(x, valid)
    for block in vla.layers:
        block.cache = torch.full((2, 3, 2, L + 3, 16), 1e4)  # what an earlier prompt left there
    with torch.no_grad():
        for at in (range(L), [L], [L + 1], [L + 2]):
            found.append(vla.body(x[:, list(at)], tables, torch.tensor(at)))
    seen = valid[..., None]
    # Processors round otherwise: 3e-5 apart on one, while a wrong key or place is off by 0.1.
    torch.testing.assert_close(torch.cat(found, 1) * seen, full * seen, atol=1e-4, rtol=1e-4)


def test_the_cache_of_one_prompt_does_no_harm_to_the_next(vla):
    tokens, kinds, valid = SEQUENCES.prompts(TEXTS, ACTION)
    answer = lambda images: vla.generate(tokens, kinds, images, valid, ACTION, 4)
    first, second = torch.rand(2, 3, 3, 16, 16)
    expected, other = answer(second), answer(first)
    place = vla.layers[1].cache.data_ptr()
    assert torch.equal(answer(second), expected) and not torch.equal(other, expected)
    assert vla.layers[1].cache.data_ptr() == place  # it stays where a CUDA graph has seen it
    assert not any("cache" in name for name in vla.state_dict())


def test_compiled_decoding_gives_the_same_tokens(vla):
    tokens, kinds, valid = SEQUENCES.prompts(TEXTS, ACTION)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    expected = vla.generate(tokens, kinds, images, valid, ACTION, 4)
    vla.decode = torch.compile(vla.decode, backend="aot_eager", fullgraph=True)
    assert torch.equal(vla.generate(tokens, kinds, images, valid, ACTION, 4), expected)


HEADERS = Path(get_paths()["include"], "Python.h")


@pytest.mark.skipif(
    not (shutil.which("g++") and HEADERS.is_file()), reason="no C++ compiler or no Python headers"
)
def test_a_control_loop_gives_the_same_tokens(vla):
    tokens, kinds, valid = SEQUENCES.prompts(TEXTS[:1], ACTION)
    images = torch.rand(5, 1, 3, 16, 16) * 2 - 1
    answers = lambda: [vla.generate(tokens, kinds, x, valid, ACTION, 4).tolist() for x in images]
    expected = answers()
    vla.compile_decode()
    assert answers() == expected


@pytest.mark.parametrize("T", [1, 2, 3, 5])
def test_peg_is_a_causal_convolution(T):
    net, x = model.PEG(6), torch.randn(2, T, 16, 6)
    net.conv.weight.data.normal_()
    padded = F.pad(x.unflatten(2, (4, 4)).movedim(-1, 1), (1, 1, 1, 1, 2, 0))  # B D T h w
    expected = net.conv(padded).movedim(1, -1).flatten(2, 3)
    torch.testing.assert_close(net(x, 4), expected)


@pytest.mark.parametrize("N", [2, 3, 16])
def test_attention_is_attention_also_over_two_frames(N):
    """Against torch's own, with the same unit queries and keys"""
    torch.manual_seed(0)
    net, x = model.Attention(32, 4, 8), torch.randn(6, N, 32)
    net.q_scale.data.uniform_(0.5, 2)
    net.k_scale.data.uniform_(0.5, 2)
    split = lambda y: y.unflatten(-1, (4, 8)).transpose(1, 2)
    k, v = map(split, net.to_kv(x).chunk(2, -1))
    q = F.normalize(split(net.to_q(net.norm(x))), dim=-1) * net.q_scale
    k = F.normalize(k, dim=-1) * net.k_scale
    expected = F.scaled_dot_product_attention(q, k, v, scale=8.0).transpose(1, 2).flatten(2)
    torch.testing.assert_close(net(x), net.to_out(expected))


def test_low_rank_changes_begin_at_nothing_from_the_meta_device_on(vla):
    with torch.device("meta"):
        net = VLA(vla.config)
    finetune.add_low_rank(net, 2, torch.bfloat16)
    c = finetune.FinetuneConfig(data="", out="", init_from="")
    training.place(net, c, training.start_processes(), net.layers)
    assert all(name.endswith(model.LOW_RANK) for name in net.adopt(vla.state_dict()))
    assert net.layers[0].wq.weight.dtype == torch.bfloat16
    rows = SEQUENCES.rows(TEXTS, [[1, 2]] * 3, ACTION)
    images = torch.rand(3, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, known = (m(rows["tokens"], rows["kinds"], images) for m in (net, vla))
    torch.testing.assert_close(hidden, known)


def test_a_model_from_the_meta_device_begins_as_one_that_was_built_in_place(vla):
    with torch.device("meta"):
        net = VLA(vla.config)
    c = pretrain.PretrainConfig(data="", out="")
    torch.manual_seed(0)
    training.place(net, c, training.start_processes(), net.layers)
    for name, tensor in VLA(vla.config).state_dict().items():
        found = net.state_dict()[name]
        if "norm" in name or name == "patch_position":
            assert torch.equal(found, tensor), name
        else:
            assert (
                found.mean().abs() < 0.02
                and 0.8 < found.std() / tensor.std() < 1.25
                or not tensor.any()
                and not found.any()
            ), name


def test_memory_of_the_7b_by_hand():
    """6.8e9 parameters: 4 bytes each in weights and gradients, 8 in Adam's moments; LoRA keeps the
    6.5e9 of the blocks in 2 bytes"""
    config = VLAConfig(latent_vocab=0, action_vocab=256)
    full, shared, low = (
        finetuning_memory(config, 1, 384, gpus, True, rank)
        for gpus, rank in ((1, 0), (8, 0), (1, 16))
    )
    assert full["weights"] == full["gradients"] == full["optimizer"] / 2 == 4 * 6_809_718_784
    assert shared["weights"] == full["weights"] / 8
    assert low["weights"] == pytest.approx(2 * 6.476e9 + 4 * 0.374e9, rel=1e-3)
    assert low["gradients"] < 0.02 * full["gradients"]
    kept = [
        finetuning_memory(config, rows, 384, 8, remade)["activations and copies"]
        for rows, remade in ((1, False), (2, False), (2, True))
    ]
    assert kept[1] - kept[0] == pytest.approx(384 * 32 * 4096 * 57, rel=0.1)  # measured: 57.4
    assert kept[2] < kept[1]


def test_positions_use_their_own_vocabulary_and_see_only_the_past(vla):
    rows = SEQUENCES.rows(["push left"], [[5, 1, 1, 2]], LATENT)
    images = torch.rand(1, 3, 16, 16)
    hidden = vla(rows["tokens"], rows["kinds"], images)
    vla.latent_embed.weight.data[5] += 1
    moved = (vla(rows["tokens"], rows["kinds"], images) - hidden).abs().amax(-1)[0] > 0
    at = int((rows["kinds"][0] == LATENT).nonzero()[0])
    assert int(moved.nonzero()[0]) == at
    moved = (vla(rows["tokens"], rows["kinds"], 1 - images) - hidden).abs().amax(-1)[0] > 0
    assert int(moved.nonzero()[0]) == int((rows["kinds"][0] == VISION).nonzero()[0])


def test_answer_loss_is_the_mean_over_rows_of_the_mean_over_tokens(vla):
    rows = SEQUENCES.rows(TEXTS, ["red", "block left push", "the block"], TEXT)
    hidden, by_hand = torch.randn(*rows["tokens"].shape, 32), []
    for h, target, mask in zip(hidden, rows["targets"], rows["mask"]):
        terms = [F.cross_entropy(vla.text_head(a), t) for a, t, m in zip(h, target, mask) if m]
        by_hand.append(sum(terms) / len(terms))
    assert [int(m.sum()) for m in rows["mask"]] == [2, 4, 3]  # rows differ, so the two means differ
    loss, right = vla.answer_loss(hidden, rows, TEXT)
    torch.testing.assert_close(loss, sum(by_hand) / 3)
    hits = vla.text_head(hidden).argmax(-1) == rows["targets"]
    torch.testing.assert_close(right, hits[rows["mask"]].float().mean())
    narrow, _ = vla.answer_loss(hidden, rows, TEXT, soft=1e-3)  # a Gaussian of no width: one-hot
    torch.testing.assert_close(narrow, loss)


def test_adopt_names_fresh_tensors_and_refuses_misshapen_ones(vla):
    heir = VLA(VLAConfig(**{**vla.config.__dict__, "latent_vocab": 0}))
    source = {k: w for k, w in vla.state_dict().items() if not k.startswith("action_")}
    assert heir.adopt(source) == ["action_embed.weight", "action_head.weight"]
    assert torch.equal(heir.layers[1].w2.weight, vla.layers[1].w2.weight)
    assert heir.adopt(vla.state_dict()) == []
    for name, wrong in (("layers.0.wq.weight", torch.zeros(32, 31)), ("stray", torch.zeros(1))):
        with pytest.raises(ValueError, match=name):
            heir.adopt({**source, name: wrong})
    del source["norm.weight"]
    with pytest.raises(ValueError, match="missing: norm.weight"):
        heir.adopt(source)


def test_a_residual_decoder_begins_with_nothing_moving():
    torch.manual_seed(0)
    frame = torch.rand(2, 3, 32, 32)
    net = LAQ(LAQConfig(**{**SMALL, "residual": True}))
    codes = torch.randint(8, (2, net.config.code_len))
    assert torch.equal(net.imagine(frame, codes), frame)
    net.config.residual = False
    assert not net.imagine(frame, codes).any()  # its head begins at zero


def test_fresh_tables_begin_where_the_body_can_read():
    shape, tags = dict(dim=32, layers=1, heads=2, mlp=48, text_vocab=12), {LATENT: 6, ACTION: 8}
    base = VLA(VLAConfig(**shape, latent_vocab=0))
    lapa, scratch = VLA(VLAConfig(**shape)), VLA(VLAConfig(**shape, latent_vocab=0, action_vocab=5))
    assert lapa.adopt(base.state_dict(), tags) == ["latent_embed.weight", "latent_head.weight"]
    scratch.adopt(base.state_dict(), tags)
    words = base.text_embed.weight
    assert torch.equal(lapa.latent_embed.weight, words[6].expand(8, -1))
    assert torch.equal(scratch.action_embed.weight, words[8].expand(5, -1))
    assert torch.equal(scratch.text_embed.weight, words)

    torch.nn.init.normal_(lapa.latent_embed.weight)
    robot = VLA(VLAConfig(**shape, latent_vocab=0, action_vocab=5))
    robot.adopt(lapa.state_dict(), tags)  # actions follow on latent actions, tag and all
    assert torch.equal(robot.action_embed.weight, lapa.latent_embed.weight.mean(0).expand(5, -1))
    assert torch.equal(robot.text_embed.weight[8], words[6])
    kept = [i for i in range(12) if i != 8]
    assert torch.equal(robot.text_embed.weight[kept], words[kept])
    fresh = VLA(VLAConfig(**shape, latent_vocab=0, action_vocab=5))  # official: random rows
    fresh.adopt(lapa.state_dict())
    assert len(fresh.action_embed.weight.unique(dim=0)) == 5


@pytest.mark.parametrize("parts", [2, 4])
def test_the_loss_of_rows_that_are_cut_does_not_depend_on_how_a_batch_is_parted(vla, parts):
    """The second row has no answer left: it counts as 0, as in the official loss"""
    few = sequences.Sequences(SEQUENCES.tokenizer, 4, length=14)
    long = "push the red block left push the red block left"
    texts = ["push the red block", long, "red", "block"]
    rows = few.rows(texts, np.arange(28).reshape(4, 7) % 16, ACTION)
    answered = (rows["mask"] & (rows["target_kinds"] == ACTION)).any(1).tolist()
    assert answered == [True, False, True, True]
    hidden = torch.randn(*rows["tokens"].shape, 32)
    whole, right = vla.answer_loss(hidden, rows, ACTION)
    halves = [
        vla.answer_loss(h, {n: x.chunk(parts)[i] for n, x in rows.items()}, ACTION)
        for i, h in enumerate(hidden.chunk(parts))
    ]
    torch.testing.assert_close(sum(loss for loss, _ in halves) / parts, whole)
    assert torch.isfinite(torch.stack([part for pair in halves for part in pair])).all()


@pytest.mark.parametrize("code_len, grid", [(1, 8), (2, 8), (4, 8), (16, 16), (64, 16), (256, 32)])
def test_the_cnn_of_each_number_of_codes_is_the_official_one(code_len, grid):
    """A convolution of stride 2, then (but for 64 and 256 codes) ReLU and another one"""
    cnn, x = code_cnn(grid, code_len, 3), torch.randn(2, 3, grid, grid)
    weights = dict(cnn.named_parameters())
    y = F.conv2d(x, weights["0.weight"], weights["0.bias"], stride=2, padding=1)
    if code_len < 64:
        how = dict(stride=2, padding=1) if code_len == 16 else {}
        y = F.conv2d(F.relu(y), weights["2.weight"], weights["2.bias"], **how)
    assert y[0, 0].numel() == code_len and len(weights) == (2 if code_len >= 64 else 4)
    torch.testing.assert_close(cnn(x), y)


def test_our_own_runs_of_older_code_keep_their_relu(tmp_path):
    """16 codes of 8 x 8 patches: their config does not know code_relu"""
    net = LAQ(LAQConfig(**SMALL | {"patch_size": 4}, code_len=16, code_relu=True)).eval()
    shape = {key: value for key, value in vars(net.config).items() if key != "code_relu"}
    for official_peg in (False, True):  # True: converted, where the ReLU was a mistake
        folder = tmp_path / str(official_peg)
        common.write_checkpoint(
            folder,
            net.state_dict().items(),
            {"stage": "quantize", "model": shape | {"official_peg": official_peg}, "step": 0},
            {},
        )
        again, _ = quantize.load_laq(folder)
        assert again.config.code_relu is not official_peg
    again, _ = quantize.load_laq(tmp_path / "False")
    pair = torch.rand(2, 2, 3, 32, 32)
    assert torch.equal(again.difference(pair), net.difference(pair))


def test_official_replacement_ends_before_step_5000():
    steps = [step for step in range(6000) if quantize.replacement_due(step, official=True)]
    assert steps == [*range(10, 100, 10), *range(100, 1000, 100), *range(1000, 5000, 500)]


def test_each_action_dimension_has_its_own_softness(vla):
    """A Gaussian over neighbouring bins where these are nearly right, none for a gripper"""
    edges = [np.linspace(0, 1, 257), np.array([-1.0, -1, 1]), np.array([-0.5, 0.5, 1.5])]
    assert data.soft_widths(edges, 8.0) == [8.0, 0.0, 0.0] and data.soft_widths(edges, 0.0) == 0.0
    rows = SEQUENCES.rows(["push", "left"], np.array([[5, 1, 0], [9, 0, 1]]), ACTION)
    hidden = torch.randn(*rows["tokens"].shape, 32)
    found, _ = vla.answer_loss(hidden, rows, ACTION, [2.0, 0.0, 0.0])
    by_hand = []
    for h, target, kind, mask in zip(hidden, rows["targets"], rows["target_kinds"], rows["mask"]):
        logits = vla.action_head(h[mask & (kind == ACTION)]).log_softmax(-1)
        move, *rest = target[mask & (kind == ACTION)].tolist()
        wanted = torch.softmax(-0.5 * ((torch.arange(16) - move) / 2.0) ** 2, 0)
        terms = [-(wanted * logits[0]).sum(), *(-logits[i + 1, t] for i, t in enumerate(rest))]
        by_hand.append(sum(terms) / 3)
    torch.testing.assert_close(found, sum(by_hand) / 2)
