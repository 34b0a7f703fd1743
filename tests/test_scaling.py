"""Several processes, resuming, kills and full disks: nothing changes, nothing is lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import common
import quantize
import training
from model import LAQ, LAQConfig

TWO = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2
STEPS = "--preset tiny --held_out 2 --batch 8 --log_every 1 --save_every 10 --steps".split()


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    """Each stage for 20 steps in one process -> the folder of its runs, and command lines"""
    home = tmp_path_factory.mktemp("trained")

    def run(*words, code=0):
        done = start(*words)
        assert done.returncode == code, done.stderr[-2000:]
        return done

    run("-m", "simulators.tabletop", home / "table", "--episodes", 12)
    shared = "--data", home / "table", *STEPS, 20, "--out"
    lines = {
        "quantize": ("quantize.py", "--shift_from", 0, *shared),
        "pretrain": ("pretrain.py", "--laq", home / "quantize", *shared),
        "finetune": ("finetune.py", "--init_from", home / "pretrain", "--labelled", 4, *shared),
    }
    lines["LoRA"] = *lines["finetune"][:5], "--lora_rank", 4, "--checkpointing", "true", *shared
    for name, line in lines.items():
        run(*line, home / name)
    return home, lines, run


def losses(folder):
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("name", ["quantize", "pretrain", "finetune", "LoRA"])
def test_two_processes_train_as_one(trained, tmp_path, name):
    home, lines, run = trained
    run(*TWO, *lines[name], tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(home / name), abs=1e-4)
    found, known = (
        load_file(common.latest(path) / "model.safetensors")
        for path in (tmp_path / "two", home / name)
    )
    assert all(torch.allclose(found[key], known[key], atol=1e-4) for key in known)


@pytest.mark.parametrize("name", ["quantize", "finetune"])
def test_one_process_resumes_two_and_two_one(trained, tmp_path, name):
    home, lines, run = trained
    for launch, steps in ((TWO, 8), ((), 14), (TWO, 20)):
        line = [steps if word == 20 else word for word in lines[name]]
        run(
            *launch, *line, tmp_path / "out", "--resume", "true", "--accumulate", 2, "--final_lr", 1
        )
    run(*lines[name], tmp_path / "straight", "--final_lr", 1)
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "straight"), abs=1e-5)


def train_rank(rank, folder, port):
    """20 steps of one of two ranks on random pairs, with replacements of dead codes"""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    c = quantize.QuantizeConfig(
        data="", out="", **{**quantize.PRESETS["tiny"], "batch": 8, "steps": 20, "warmup": 0}
    )
    processes = training.start_processes(c)
    torch.manual_seed(0)
    net = LAQ(LAQConfig(**{name: getattr(c, name) for name in LAQConfig.__dataclass_fields__}))
    net.quantizer.codebook.data.fill_(30)
    training.place(net, c, processes, net.all_layers, unsharded=[net.quantizer.codebook])
    optimizer = quantize.make_optimizer(net, c.lr, c.codebook_lr)
    pairs = torch.from_numpy(np.random.default_rng(0).random((8, 2, 3, 32, 32), np.float32))
    for step in range(20):
        training.seed_step(c.seed, step)
        loss, d, indices = net(pairs[processes.local_rows])
        loss.backward()
        processes.clip_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        quantize.update_codebook(net, d.detach(), indices, c, step, processes)
    torch.save((net.quantizer.codebook.data, net.quantizer.uses), f"{folder}/{rank}.pt")
    processes.close()


def test_codebooks_are_the_same_on_both_ranks_to_the_bit(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.spawn(train_rank, (str(tmp_path), port), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert (one[0] < 29).any()  # dead codes were moved


def test_a_killed_rank_ends_the_other(trained, tmp_path):
    home, lines, _ = trained
    line = [100_000 if word == 20 else word for word in lines["quantize"]]
    words = [str(ROOT / word if str(word).endswith(".py") else word) for word in (*TWO, *line)]
    launched = subprocess.Popen(
        [sys.executable, *words, str(tmp_path / "out")],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, limit = tmp_path / "out/metrics.jsonl", time.time() + 120
    while not (log.is_file() and log.read_text()):
        assert time.time() < limit and launched.poll() is None
        time.sleep(0.2)
    ranks = [
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit()
        and f"--out\0{tmp_path}/out".encode() in read(p / "cmdline")
        and b"torch.distributed.run" not in read(p / "cmdline")
    ]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert launched.wait(timeout=60) != 0
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


# ---------------------------------------------------------------- kills, signals, full disks
SAVER = """
import os, signal, sys, time, random, contextlib
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import common, training
from test_stages import make_run
import torch
torch.set_num_threads(1)
common.tqdm.monitor_interval = 0
random.seed(0)
out, last = {out!r}, 0
run, net, optimizer = make_run(out + ".warm")
run.save(0, net, optimizer)  # what is slow the first time
make_run(out + ".warm", resume=True)
for trial in range(20):
    child = os.fork()
    if not child:
        run, net, optimizer = make_run(out, resume=True)
        for step, _ in run.steps(iter(int, 1), "x"):
            net.weight.data.fill_(step + 1)
            (net(torch.ones(2)).sum() * 0).backward()
            run.processes.clip_gradients(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            net.weight.data.fill_(step + 1)
            run.log(step, {{}})
            run.save(step, net, optimizer)
    time.sleep(0.4 + random.random() * 0.4)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    weights, meta = common.load_checkpoint(out, "out", ("quantize",))
    assert weights["weight"][:].tolist() == [[meta["step"]] * 2], meta["step"]
    print("trial", meta["step"], flush=True)
    assert meta["step"] >= last
    last = meta["step"]
"""


def test_twenty_kills_lose_nothing(tmp_path):
    script = SAVER.format(root=str(ROOT), out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [int(step) for step in re.findall(r"trial (\d+)", done.stdout)]
    assert len(steps) == 20 and steps[-1] > steps[0] > 0


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_run_behind_its_step(trained, tmp_path, kind):
    home, lines, run = trained
    line = [
        str(ROOT / w) if str(w).endswith(".py") else str(100_000 if w == 20 else w)
        for w in lines["pretrain"]
    ]
    launched = subprocess.Popen(
        [sys.executable, *line, str(tmp_path / "out")],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log, limit = tmp_path / "out/metrics.jsonl", time.time() + 120
    while not (log.is_file() and log.read_text()):
        assert time.time() < limit and launched.poll() is None
        time.sleep(0.1)
    launched.send_signal(kind)
    said = launched.communicate(timeout=60)[0]
    assert launched.returncode == 128 + kind and "stopped by a signal after step" in said
    assert "Traceback" not in said
    step = json.loads((common.latest(tmp_path / "out") / "config.json").read_text())["step"]
    assert f"after step {step};" in said and len(losses(tmp_path / "out")) == step


def test_a_loss_that_is_not_finite_names_the_episodes(trained, tmp_path):
    home, lines, run = trained
    done = run(*lines["pretrain"], tmp_path / "out", "--lr", 10**15, "--save_every", 1, code=2)
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: the loss is ") and "episodes robot_000" in error
    assert "last good checkpoint" in error and "Traceback" not in done.stderr


def test_a_full_disk_leaves_the_last_checkpoint(trained, tmp_path):
    home, lines, run = trained
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=9m", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("cannot mount a small tmpfs")
    try:
        line = [*lines["quantize"], disk / "out", "--keep", 99, "--save_every", 1]
        done = run(*line, code=2)
        error = done.stderr.splitlines()[-1]
        assert "not written" in error and "Traceback" not in done.stderr
        last = common.latest(disk / "out")
        assert str(last) in error
        weights, meta = common.load_checkpoint(disk / "out", "out", ("quantize",))
        assert 0 < meta["step"] < 20 and all(w[:].isfinite().all() for w in weights.values())
        assert not list((disk / "out").glob(".step*"))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
