"""The two networks: LAQ with its codebook, the VLA, and weights in and out."""

import ast
import shutil
import sys
from pathlib import Path
from sysconfig import get_paths

import numpy as np
import pytest
import torch
from small import SEQUENCES, SMALL, TEXTS
from torch.nn import functional as F

import data
import model
import pretrain
import sequences
import training
from model import ACTION, LAQ, LATENT, TEXT, VISION, VLA, LAQConfig, VLAConfig, nearest
from model.laq import code_cnn

HEADERS = Path(get_paths()["include"], "Python.h")


# ---------------------------------------------------------------- LAQ: fast paths, plain forms
def assert_equal_forms(plain, fast, *leaves):
    """A fast path and its plain form give the same values and gradients"""
    expected, found = plain(), fast()
    torch.testing.assert_close(found, expected)
    noise = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, leaves, noise),
        torch.autograd.grad(expected, leaves, noise),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def heads_of(rows, count):
    """Random queries, keys or values, [rows, count, 4 heads, 8]"""
    return torch.randn(rows, count, 4, 8, requires_grad=True)


@pytest.mark.parametrize("T", [1, 2, 3, 5])
def test_peg_is_a_causal_convolution(T):
    net, x = model.laq.PEG(6), torch.randn(2, T, 16, 6, requires_grad=True)
    torch.nn.init.normal_(net.conv.weight)
    padded = F.pad(x.unflatten(2, (4, 4)).movedim(-1, 1), (1, 1, 1, 1, 2, 0))  # B D T h w
    expected = net.conv(padded).movedim(1, -1).flatten(2, 3)
    torch.testing.assert_close(net(x, 4), expected)
    if T <= 2:
        assert_equal_forms(
            lambda: net.convolve(x, 4), lambda: net.convolve_two(x, 4), x, *net.parameters()
        )


@pytest.mark.parametrize("N", [2, 3, 16])
def test_attention_is_attention_also_over_two_frames(N):
    """Against torch's own, with the same unit queries and keys"""
    torch.manual_seed(0)
    net, x = model.laq.Attention(32, 4, 8), torch.randn(6, N, 32)
    net.q_scale.data.uniform_(0.5, 2)
    net.k_scale.data.uniform_(0.5, 2)

    def split(y):
        return y.unflatten(-1, (4, 8)).transpose(1, 2)

    k, v = map(split, net.to_kv(x).chunk(2, -1))
    q = F.normalize(split(net.to_q(net.norm(x))), dim=-1) * net.q_scale
    k = F.normalize(k, dim=-1) * net.k_scale
    expected = F.scaled_dot_product_attention(q, k, v, scale=8.0).transpose(1, 2).flatten(2)
    torch.testing.assert_close(net(x), net.to_out(expected))
    q, k, v = heads_of(6, N), heads_of(6, 2), heads_of(6, 2)
    assert_equal_forms(
        lambda: model.laq.attend(q, k, v), lambda: model.laq.attend_to_two(q, k, v), q, k, v
    )


@pytest.mark.parametrize("biased", [True, False])
def test_attention_over_the_grid_is_attention(biased):
    q, k, v = (heads_of(3, 16) for _ in range(3))
    bias = torch.randn(1, 4, 16, 16, requires_grad=True) if biased else None
    assert_equal_forms(
        lambda: model.laq.attend(q, k, v, bias),
        lambda: model.laq.attend_by_products(q, k, v, bias),
        *((q, k, v, bias) if biased else (q, k, v)),
    )


@pytest.mark.parametrize("grid", [1, 2, 5])
def test_position_bias_depends_on_the_offset_alone(grid):
    net = model.laq.PositionBias(12, 3, grid)
    assert_equal_forms(net.compute, net.look_up, *net.parameters())
    bias = net().unflatten(3, (grid, grid)).unflatten(2, (grid, grid))[0]  # heads y x y x
    assert torch.equal(bias[:, :-1, :-1, :-1, :-1], bias[:, 1:, 1:, 1:, 1:])


def test_the_misread_peg_convolves_patches_of_both_frames_as_if_they_were_one():
    """The official temporal PEG: element (n, t) in memory is read as number n T + t of (t, n)"""
    peg, x = model.laq.MisreadPEG(6), torch.randn(2, 2, 16, 6)
    torch.nn.init.normal_(peg.conv.weight)
    found = peg(x, 4)
    mixed = torch.stack([x[:, i % 2, i // 2] for i in range(32)], dim=1).unflatten(1, (2, 16))
    expected = peg.convolve(mixed, 4).flatten(1, 2)  # B 32 D
    for i in range(32):
        torch.testing.assert_close(found[:, i % 2, i // 2], expected[:, i])
    net = LAQ(LAQConfig(**SMALL, official_peg=True))
    assert type(net.temporal_encoder.layers[0].peg) is model.laq.MisreadPEG
    assert (
        type(net.spatial_encoder.layers[0].peg) is type(net.decoder.layers[0].peg) is model.laq.PEG
    )


@pytest.mark.parametrize("code_len, grid", [(1, 8), (2, 8), (4, 8), (16, 16), (64, 16), (256, 32)])
def test_the_cnn_of_each_number_of_codes_is_the_official_one(code_len, grid):
    """A convolution of stride 2, then (except for 64 and 256 codes) ReLU and another one"""
    cnn, x = code_cnn(grid, code_len, 3), torch.randn(2, 3, grid, grid)
    weights = dict(cnn.named_parameters())
    y = F.conv2d(x, weights["0.weight"], weights["0.bias"], stride=2, padding=1)
    if code_len < 64:
        how = dict(stride=2, padding=1) if code_len == 16 else {}
        y = F.conv2d(F.relu(y), weights["2.weight"], weights["2.bias"], **how)
    assert y[0, 0].numel() == code_len and len(weights) == (2 if code_len >= 64 else 4)
    torch.testing.assert_close(cnn(x), y)


# ---------------------------------------------------------------- LAQ: codebook and gradients
def test_nsvq_keeps_the_distance_and_reaches_encoder_and_codebook():
    quantizer, d = model.laq.Quantizer(LAQConfig(**SMALL)), torch.randn(6, 4, 8, requires_grad=True)
    gaps = (d[:, :, None] - quantizer.codebook).norm(dim=-1)
    indices = nearest(d, quantizer.codebook)
    assert torch.equal(indices, gaps.argmin(-1))
    value = quantizer.nsvq_substitute(d, indices)
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
    quantizer = LAQ(LAQConfig(**SMALL, official_counting=official_rule)).quantizer
    before = quantizer.codebook.detach().clone()
    quantizer.count_uses(torch.tensor([[3, 3, 3, 1]]))
    assert quantizer.uses[[3, 1]].tolist() == expected
    assert "uses" in quantizer.state_dict()  # resuming continues the count
    assert torch.equal(quantizer.codebook, before)  # unless it is pulled


def test_used_entries_are_pulled_to_the_mean_of_what_chose_them():
    quantizer, d = model.laq.Quantizer(LAQConfig(**SMALL)), torch.randn(1, 4, 8)
    expected = quantizer.codebook.detach().clone()
    expected[3] = 0.8 * expected[3] + 0.2 * d[0, :3].mean(0)
    expected[1] = 0.8 * expected[1] + 0.2 * d[0, 3]
    quantizer.pull_to_means(d, torch.tensor([[3, 3, 3, 1]]), pull=0.2)
    torch.testing.assert_close(quantizer.codebook.detach(), expected)


def test_dead_codes_land_on_encoder_outputs_of_the_batch():
    quantizer, d = model.laq.Quantizer(LAQConfig(**SMALL)), torch.randn(16, 4, 8)
    before = quantizer.codebook.detach().clone()
    uses = torch.tensor([[0, 1, 2, 3]] * 20 + [[4, 0, 0, 0]])  # 4: under 10 % of a fair share
    quantizer.count_uses(uses)
    assert quantizer.replace_dead_codes(torch.cat((d, before[:4].expand(4, 4, 8)))) == 4
    after = quantizer.codebook.detach()
    gaps = (d.flatten(0, 1)[:, None] - after[4:]).norm(dim=-1)
    assert torch.equal(after[:4], before[:4])
    assert gaps.min(0).values.max() == 0 and len(gaps.argmin(0).unique()) == 4
    assert quantizer.uses.sum() == 0


def test_codes_that_take_turns_far_from_the_data_are_dead():
    """All entries at one far point: each batch finds one of them, which then drifts, so that soon
    every entry was used.  A batch that uses a single code is collapsed all the same."""
    quantizer, d = model.laq.Quantizer(LAQConfig(**SMALL)), torch.randn(16, 4, 8)
    quantizer.codebook.data.fill_(50.0)
    for i in range(48):
        quantizer.count_uses(torch.full((16, 4), i % 8))
    quantizer.replace_dead_codes(d)
    assert len(nearest(d, quantizer.codebook).unique()) >= 7


def test_a_residual_decoder_begins_with_nothing_moving():
    torch.manual_seed(0)
    frame = torch.rand(2, 3, 32, 32)
    net = LAQ(LAQConfig(**{**SMALL, "residual": True}))
    codes = torch.randint(8, (2, net.config.code_len))
    assert torch.equal(net.imagine(frame, codes), frame)
    net.config.residual = False
    assert not net.imagine(frame, codes).any()  # its head begins at zero


# ---------------------------------------------------------------- VLA: rows and losses
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
    for h, target, mask in zip(hidden, rows["targets"], rows["mask"], strict=True):
        terms = [
            F.cross_entropy(vla.text_head(a), t) for a, t in zip(h[mask], target[mask], strict=True)
        ]
        by_hand.append(sum(terms) / len(terms))
    assert [int(m.sum()) for m in rows["mask"]] == [2, 4, 3]  # rows differ, so the two means differ
    loss, right = vla.answer_loss(hidden, rows, TEXT)
    torch.testing.assert_close(loss, sum(by_hand) / 3)
    hits = vla.text_head(hidden).argmax(-1) == rows["targets"]
    torch.testing.assert_close(right, hits[rows["mask"]].float().mean())
    narrow, _ = vla.answer_loss(hidden, rows, TEXT, soft=1e-3)  # a Gaussian of no width: one-hot
    torch.testing.assert_close(narrow, loss)


@pytest.mark.parametrize("parts", [2, 4])
def test_the_loss_of_cut_rows_does_not_depend_on_how_a_batch_is_split(vla, parts):
    """The second row has no answer left: it counts as 0, as in the official loss"""
    builder = sequences.Sequences(SEQUENCES.tokenizer, 4, length=14)
    long = "push the red block left push the red block left"
    texts = ["push the red block", long, "red", "block"]
    rows = builder.rows(texts, np.arange(28).reshape(4, 7) % 16, ACTION)
    answered = (rows["mask"] & (rows["target_kinds"] == ACTION)).any(1).tolist()
    assert answered == [True, False, True, True]
    hidden = torch.randn(*rows["tokens"].shape, 32)
    expected, _ = vla.answer_loss(hidden, rows, ACTION)
    pairs = [
        vla.answer_loss(h, {n: x.chunk(parts)[i] for n, x in rows.items()}, ACTION)
        for i, h in enumerate(hidden.chunk(parts))
    ]
    torch.testing.assert_close(sum(loss for loss, _ in pairs) / parts, expected)
    assert torch.isfinite(torch.stack([part for pair in pairs for part in pair])).all()


def test_soft_targets_are_a_gaussian_around_the_true_token():
    one = model.vla.soft_targets(torch.tensor([3, 0]), 8, 1.5)
    assert one.argmax(-1).tolist() == [3, 0]
    torch.testing.assert_close(one[0, 2], one[0, 4])
    torch.testing.assert_close(one[0, 4] / one[0, 3], torch.tensor(-0.5 / 1.5**2).exp())
    each = model.vla.soft_targets(torch.tensor([3, 0]), 8, torch.tensor([[1.5], [0.5]]))
    torch.testing.assert_close(each[0], one[0])
    assert each[1, 0] > one[1, 0]


def test_official_generation_gives_0_after_a_token_2():
    answer = torch.tensor([[1, 2, 3, 4], [2, 2, 1, 1], [1, 3, 4, 5]])
    assert model.vla.zero_after_end(answer).tolist() == [[1, 2, 0, 0], [2, 0, 0, 0], [1, 3, 4, 5]]


def test_padding_sees_itself_and_takes_no_position():
    valid = torch.tensor([[False, False, True, True], [True, True, True, True]])
    assert model.vla.positions(valid).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    seen = model.vla.causal_mask(valid, torch.float32) == 0
    assert seen[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert torch.equal(seen[1, 0], torch.ones(4, 4).tril() > 0)


def test_each_action_dimension_has_its_own_softness(vla):
    """A Gaussian over neighboring bins where these are nearly right, none for a gripper"""
    edges = [np.linspace(0, 1, 257), np.array([-1.0, -1, 1]), np.array([-0.5, 0.5, 1.5])]
    assert data.soft_widths(edges, 8.0) == [8.0, 0.0, 0.0] and data.soft_widths(edges, 0.0) == 0.0
    rows = SEQUENCES.rows(["push", "left"], np.array([[5, 1, 0], [9, 0, 1]]), ACTION)
    hidden = torch.randn(*rows["tokens"].shape, 32)
    found, _ = vla.answer_loss(hidden, rows, ACTION, [2.0, 0.0, 0.0])
    by_hand = []
    columns = rows["targets"], rows["target_kinds"], rows["mask"]
    for h, target, kind, mask in zip(hidden, *columns, strict=True):
        logits = vla.action_head(h[mask & (kind == ACTION)]).log_softmax(-1)
        move, *rest = target[mask & (kind == ACTION)].tolist()
        wanted = torch.softmax(-0.5 * ((torch.arange(16) - move) / 2.0) ** 2, 0)
        terms = [-(wanted * logits[0]).sum(), *(-logits[i + 1, t] for i, t in enumerate(rest))]
        by_hand.append(sum(terms) / 3)
    torch.testing.assert_close(found, sum(by_hand) / 2)


# ---------------------------------------------------------------- VLA: generation
@pytest.mark.parametrize("kind", [LATENT, ACTION, TEXT])
def test_generation_with_a_cache_equals_the_full_pass_with_and_without_padding(vla, kind):
    tokens, kinds, valid = SEQUENCES.prompts(TEXTS, kind)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    found = vla.generate(tokens, kinds, images, valid, kind, 5)
    rows = torch.cat((tokens, found), 1), torch.cat((kinds, torch.full_like(found, kind)), 1)
    hidden = vla(*rows, images, torch.cat((valid, found >= 0), 1))
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
    rows = torch.cat((tokens, answer), 1), torch.cat((kinds, torch.full_like(answer, ACTION)), 1)
    valid = torch.cat((valid, answer > 0), 1)
    expected = vla(*rows, images, valid)
    x, found, L = vla.embed(*rows, images), [], tokens.shape[1]
    cos, sin, mask = vla.attention_inputs(x, valid)
    for block in vla.layers:
        block.cache = model.vla.KVCache((3, 2, L + 3, 16), x)
        block.cache.keys.fill_(1e4)  # what an earlier prompt left there
        block.cache.values.fill_(1e4)
    with torch.no_grad():
        for at in (range(L), [L], [L + 1], [L + 2]):
            at = torch.tensor(at)
            inputs = (table[:, :, at] for table in (cos, sin, mask))
            found.append(vla.body(x[:, at], *inputs, at))
    seen = valid[..., None]
    # Processors round differently: 3e-5 apart on one, while a wrong key or place is off by 0.1.
    torch.testing.assert_close(torch.cat(found, 1) * seen, expected * seen, atol=1e-4, rtol=1e-4)


def test_the_cache_of_one_prompt_does_no_harm_to_the_next(vla):
    tokens, kinds, valid = SEQUENCES.prompts(TEXTS, ACTION)

    def answer(images):
        return vla.generate(tokens, kinds, images, valid, ACTION, 4)

    first, second = torch.rand(2, 3, 3, 16, 16)
    expected, other = answer(second), answer(first)
    places = [x.data_ptr() for x in vla.layers[1].cache.buffers()]
    assert torch.equal(answer(second), expected) and not torch.equal(other, expected)
    # It stays where a CUDA graph has seen it.
    assert [x.data_ptr() for x in vla.layers[1].cache.buffers()] == places
    assert not any("cache" in name for name in vla.state_dict())


def test_compiled_decoding_gives_the_same_tokens(vla):
    tokens, kinds, valid = SEQUENCES.prompts(TEXTS, ACTION)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    expected = vla.generate(tokens, kinds, images, valid, ACTION, 4)
    for name in ("prefill", "decode_one_token"):
        step = torch.compile(getattr(vla, name), backend="aot_eager", fullgraph=True)
        setattr(vla, name, step)
    assert torch.equal(vla.generate(tokens, kinds, images, valid, ACTION, 4), expected)


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") and HEADERS.is_file()), reason="no C++ compiler or no Python headers"
)
def test_a_compiled_control_loop_gives_the_same_tokens(vla):
    tokens, kinds, valid = SEQUENCES.prompts(TEXTS[:1], ACTION)
    images = torch.rand(5, 1, 3, 16, 16) * 2 - 1

    def answers():
        return [vla.generate(tokens, kinds, x, valid, ACTION, 4).tolist() for x in images]

    expected = answers()
    vla.compile_decode()
    assert answers() == expected


# ---------------------------------------------------------------- weights in and out
def test_differences_names_every_tensor():
    expected = {"a": (1,), "b": (2, 3), "c": (4,)}
    assert model.differences(expected, expected) == ""
    found = model.differences(expected, {"b": (3, 2), "c": (4,), "d": (5,)})
    assert found == "missing: a; unexpected: d; wrong shape: b (3, 2), expected (2, 3)"


def test_model_needs_torch_and_the_standard_library_alone():
    names = set()
    for path in Path(model.__file__).parent.glob("*.py"):
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(n, ast.Import):
                names |= {alias.name for alias in n.names}
            elif isinstance(n, ast.ImportFrom) and not n.level:  # others are its own
                names.add(n.module)
    roots = {name.partition(".")[0] for name in names}
    assert roots - {"torch"} <= set(sys.stdlib_module_names)


def test_load_pretrained_names_fresh_tensors_and_refuses_misshapen_ones(vla):
    heir = VLA(VLAConfig(**{**vla.config.__dict__, "latent_vocab": 0}))
    source = {k: w for k, w in vla.state_dict().items() if not k.startswith("action_")}
    assert heir.load_pretrained(source) == ["action_embed.weight", "action_head.weight"]
    assert torch.equal(heir.layers[1].w2.weight, vla.layers[1].w2.weight)
    assert heir.load_pretrained(vla.state_dict()) == []
    for name, wrong in (("layers.0.wq.weight", torch.zeros(32, 31)), ("stray", torch.zeros(1))):
        with pytest.raises(ValueError, match=name):
            heir.load_pretrained({**source, name: wrong})
    del source["norm.weight"]
    with pytest.raises(ValueError, match="missing: norm.weight"):
        heir.load_pretrained(source)


def test_fresh_tables_begin_where_the_body_can_read():
    shape, tags = dict(dim=32, layers=1, heads=2, mlp=48, text_vocab=12), {LATENT: 6, ACTION: 8}
    base = VLA(VLAConfig(**shape, latent_vocab=0))
    lapa, scratch = VLA(VLAConfig(**shape)), VLA(VLAConfig(**shape, latent_vocab=0, action_vocab=5))
    fresh = lapa.load_pretrained(base.state_dict())
    assert fresh == ["latent_embed.weight", "latent_head.weight"]
    lapa.start_from_tags(base.state_dict(), fresh, tags)
    fresh = scratch.load_pretrained(base.state_dict())
    scratch.start_from_tags(base.state_dict(), fresh, tags)
    words = base.text_embed.weight
    assert torch.equal(lapa.latent_embed.weight, words[6].expand(8, -1))
    assert torch.equal(scratch.action_embed.weight, words[8].expand(5, -1))
    assert torch.equal(scratch.text_embed.weight, words)

    torch.nn.init.normal_(lapa.latent_embed.weight)
    robot = VLA(VLAConfig(**shape, latent_vocab=0, action_vocab=5))
    fresh = robot.load_pretrained(lapa.state_dict())
    robot.start_from_tags(lapa.state_dict(), fresh, tags)  # actions follow on latent actions
    assert torch.equal(robot.action_embed.weight, lapa.latent_embed.weight.mean(0).expand(5, -1))
    assert torch.equal(robot.text_embed.weight[8], words[6])
    kept = [i for i in range(12) if i != 8]
    assert torch.equal(robot.text_embed.weight[kept], words[kept])
    official = VLA(VLAConfig(**shape, latent_vocab=0, action_vocab=5))  # its rows stay random
    official.load_pretrained(lapa.state_dict())
    assert len(official.action_embed.weight.unique(dim=0)) == 5


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
