"""Several processes, kills and signals: nothing changes, nothing is lost."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from runs import fill_in, read_config, read_losses, read_weights
from small import SMALL

import quantize
import training
from model import LAQ, LAQConfig

TWO = "-m torch.distributed.run --standalone --nproc_per_node 2"
SHORT = "--data DIR/table --preset tiny --held_out 2 --batch 8 --log_every 1 --save_every 10"
FINETUNE = f"finetune.py {SHORT} --init_from DIR/pretrain --labelled 4"
LINES = {  # each run needs those before it
    "quantize": f"quantize.py {SHORT} --shift_from 0",
    "pretrain": f"pretrain.py {SHORT} --laq DIR/quantize",
    "finetune": FINETUNE,
    "LoRA": f"{FINETUNE} --lora_rank 4 --checkpointing true",
}


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory):
    """Each stage for 20 steps in one process -> `folder` of these runs, `run` for more of them:
    run("quantize", OUT, steps=20, launcher="", more="") waits; words(..) is that command's line"""
    folder = tmp_path_factory.mktemp("trained")

    def words(name, out, steps=20, launcher="", more=""):
        line = f"{launcher} {LINES[name]} --steps {steps} {more} --out"
        return [*fill_in(line, {"DIR": folder}).split(), str(out)]

    def run(*arguments, **named):
        done = start(*words(*arguments, **named))
        assert done.returncode == 0, done.stderr[-2000:]

    done = start("-m", "simulators.tabletop", folder / "table", "--episodes", 12)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in LINES:
        run(name, folder / name)
    return SimpleNamespace(folder=folder, words=words, run=run)


def launch(words, folder, **output):
    """Start a command line in the background -> the process, once OUT in `folder` has logged"""
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    process = subprocess.Popen([sys.executable, *words], cwd=folder, **output)
    log = folder / "out/metrics.jsonl"
    limit = time.time() + 120
    while not (log.is_file() and log.read_text()):
        assert time.time() < limit and process.poll() is None
        time.sleep(0.1)
    return process


# ---------------------------------------------------------------- two processes
@pytest.mark.parametrize("name", LINES)
def test_two_processes_train_as_one(trained, tmp_path, name):
    trained.run(name, tmp_path / "two", launcher=TWO)
    one, two = trained.folder / name, tmp_path / "two"
    assert read_losses(two) == pytest.approx(read_losses(one), abs=1e-4)
    expected, found = read_weights(one), read_weights(two)
    assert all(torch.allclose(found[key], expected[key], atol=1e-4) for key in expected)


@pytest.mark.parametrize("name", ["quantize", "finetune"])
def test_one_process_resumes_two_and_two_one(trained, tmp_path, name):
    constant = "--final_lr 1"
    more = f"--resume true --accumulate 2 {constant}"
    for processes, steps in ((TWO, 8), ("", 14), (TWO, 20)):
        trained.run(name, tmp_path / "out", steps, processes, more)
    trained.run(name, tmp_path / "straight", more=constant)
    expected = read_losses(tmp_path / "straight")
    assert len(expected) == 20
    assert read_losses(tmp_path / "out") == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_two_processes_train_one_checkpoint(start, make_dataset, tmp_path):
    folder = make_dataset({f"e{i}": 6 for i in range(4)})
    shape = " ".join(f"--{name} {value}" for name, value in SMALL.items())
    line = f"{TWO} quantize.py --preset tiny {shape} --held_out 1 --steps 4 --batch 8 --log_every 1"
    done = start(*line.split(), "--data", folder, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "run").glob("step_*")] == ["step_00000004"]
    assert len(read_losses(tmp_path / "run")) == 4


def train_rank(rank, folder, port):
    """20 steps of one of two ranks on random pairs, with replacements of dead codes"""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    c = quantize.QuantizeConfig(
        data="", out="", **{**quantize.PRESETS["tiny"], "batch": 8, "steps": 20, "warmup": 0}
    )
    processes = training.start_processes(c)
    torch.manual_seed(0)
    network = LAQ(LAQConfig(**{field.name: getattr(c, field.name) for field in fields(LAQConfig)}))
    quantizer = network.quantizer
    quantizer.codebook.data.fill_(30)
    training.place(network, c, processes, network.all_layers, unsharded=[quantizer.codebook])
    optimizer = quantize.make_optimizer(network, c.lr, c.codebook_lr)
    pairs = torch.from_numpy(np.random.default_rng(0).random((8, 2, 3, 32, 32), np.float32))
    for step in range(20):
        training.seed_step(c.seed, step)
        loss, d, indices = network(pairs[processes.local_rows])
        loss.backward()
        processes.clip_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        quantize.update_codebook(network, d.detach(), indices, c, step, processes)
    torch.save((quantizer.codebook.data, quantizer.uses), f"{folder}/{rank}.pt")
    processes.close()


@pytest.mark.slow
def test_codebooks_are_the_same_on_both_ranks_to_the_bit(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.spawn(train_rank, (str(tmp_path), port), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert (one[0] < 29).any()  # dead codes were moved


# ---------------------------------------------------------------- kills and signals
def test_a_killed_rank_ends_the_other(trained, tmp_path):
    words = trained.words("quantize", tmp_path / "out", 100_000, TWO)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    parent = launch(words, tmp_path, **quiet)
    ranks = [
        int(process.name)
        for process in Path("/proc").iterdir()
        if process.name.isdigit() and is_rank(read_bytes(process / "cmdline"), tmp_path / "out")
    ]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert parent.wait(timeout=60) != 0
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def is_rank(command, out):
    """Whether a process's command line trains into the folder `out`, and does not launch others"""
    return f"--out\0{out}".encode() in command and b"torch.distributed.run" not in command


def read_bytes(path):
    try:
        return path.read_bytes()
    except OSError:  # the process has ended
        return b""


SAVER = """
import os, signal, sys, time, random
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import common, training
from runs import make_run
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


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tmp_path):
    script = SAVER.format(root=str(ROOT), out=str(tmp_path / "out"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [int(step) for step in re.findall(r"trial (\d+)", done.stdout)]
    assert len(steps) == 20 and steps[-1] > steps[0] > 0


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_its_step(trained, tmp_path, kind):
    words = trained.words("pretrain", tmp_path / "out", 100_000)
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = launch(words, tmp_path, **both)
    process.send_signal(kind)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + kind and "Traceback" not in said
    step = read_config(tmp_path / "out")["step"]
    assert f"stopped by a signal after step {step};" in said
    assert len(read_losses(tmp_path / "out")) == step
