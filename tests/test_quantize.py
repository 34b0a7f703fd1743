"""Stage 1: the codebook heals, older runs keep their shape"""

from dataclasses import fields

import numpy as np
import pytest
import torch
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
    processes = training.start_processes()
    c.steps, most = 2000, 0
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
    assert training.share_of_batch(8, rank=1, world=2, accumulate=1) == slice(4, 8)
    with pytest.raises(SystemExit):
        training.share_of_batch(8, rank=1, world=2, accumulate=3)


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
