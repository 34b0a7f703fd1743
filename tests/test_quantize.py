"""Stage 1: the codebook heals, labels are made in the precision of training, older runs keep their
shape."""

import importlib.util
from dataclasses import fields

import numpy as np
import pytest
import torch
from runs import SHORT, same_tensors
from safetensors.torch import load_file
from small import SMALL

import common
import data
import quantize
import training
from model import LAQ, LAQConfig
from simulators import tabletop


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
    processes = training.Processes(clip=c.clip)
    c.steps = 2000
    most = 0
    for step in range(first, first + 200):
        rng = np.random.default_rng(step)
        t, table = rng.integers(10, size=16), rng.integers(64, size=16)
        pair = np.stack(frames)[[t, t + 3], table].swapaxes(0, 1)
        training.seed_step(c.seed, step)
        loss, d, indices = net(data.to_float(pair))
        loss.backward()
        training.set_learning_rate(optimizer, c, step)
        processes.clip_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        codes = quantize.update_codebook(net, d.detach(), indices, c, step, processes)
        most = max(most, codes)
        if most == 8:
            break
    assert (most == 8) != official_rule


def test_labels_are_made_in_the_precision_of_training(call, runs, tmp_path, monkeypatch):
    in_bfloat16 = []
    label = LAQ.label

    def noted_label(model, pair):
        in_bfloat16.append(torch.is_autocast_enabled("cpu"))
        return label(model, pair)

    monkeypatch.setattr(LAQ, "label", noted_label)
    for bf16 in ("true", "false"):
        run, file = tmp_path / bf16, tmp_path / f"{bf16}.safetensors"
        line = f"quantize.py {SHORT} --data DIR/table --held_out 2 --bf16 {bf16} --out"
        assert call(line, run) == 0
        assert call("quantize.py label --data DIR/table --laq", run, "--out", file) == 0
        assert in_bfloat16 and set(in_bfloat16) == {bf16 == "true"}
        assert same_tensors(load_file(run / "labels.safetensors"), load_file(file))
        in_bfloat16.clear()


def test_the_shift_grows_from_its_first_step_until_it_is_whole():
    shifts = [quantize.shift_at(step, 0.4, 10, 14) for step in (0, 9, 10, 11, 13, 14, 99)]
    assert shifts == pytest.approx([0, 0, 0.1, 0.2, 0.4, 0.4, 0.4])
    assert quantize.shift_at(0, 0.4, 0, 0) == 0.4


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


def test_dead_codes_are_replaced_often_at_first():
    steps = [step for step in range(301) if quantize.replacement_due(step)]
    assert steps == [*range(10, 100, 10), *range(100, 301, 50)]


def test_official_replacement_ends_before_step_5000():
    steps = [step for step in range(6000) if quantize.replacement_due(step, official=True)]
    assert steps == [*range(10, 100, 10), *range(100, 1000, 100), *range(1000, 5000, 500)]


def test_a_report_without_the_analysis_room_is_refused(inside, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = ("report", "--laq", tmp_path, "--data", tmp_path, "--out", tmp_path / "report")
    assert inside("quantize.py", *line) == 2
    assert capsys.readouterr().err == (
        "error: report: it needs the folder analysis/, which is missing\n"
    )
