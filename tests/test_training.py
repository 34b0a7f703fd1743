"""One optimization step, the schedule of the learning rate, and the run folder: what is logged and
saved, how a run resumes, what it refuses, full disks."""

import errno
import json
import math
import shutil
import signal
import subprocess

import pytest
import torch
from runs import (
    COMMANDS,
    FINETUNE,
    PRETRAIN,
    SHORT,
    fill_in,
    make_run,
    read_config,
    read_jsonl,
    read_losses,
    read_training_state,
    read_weights,
    same_tensors,
)
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import CheckpointException

import common
import data
import training


# ---------------------------------------------------------------- learning rate
def test_the_learning_rate_by_hand():
    """4 steps of warm-up, then half a cosine from 1 down to 0.2 within 6 steps"""
    factors = [training.warmup_cosine(step, 10, 4, 0.2) for step in range(10)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert factors[5] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 6)) / 2)
    assert factors[7] == pytest.approx(0.6)  # half way
    assert factors[9] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * 5 / 6)) / 2)
    assert training.warmup_cosine(10, 10, 4, 0.2) == pytest.approx(0.2)


def test_a_final_rate_of_one_is_constant():
    assert [training.warmup_cosine(step, 10, 0, 1.0) for step in range(10)] == [1.0] * 10


def test_every_group_follows_the_schedule_from_its_own_peak():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, (1.0, 10.0), strict=True)]
    optimizer = training.make_optimizer(groups)
    shared = {"data": "", "out": "", "batch": 1, "lr": 1.0}
    config = training.TrainConfig(**shared, steps=10, warmup=4, final_lr=0.2)
    for step, factor in ((0, 0.25), (4, 1.0), (7, 0.6)):
        training.set_learning_rate(optimizer, config, step)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([factor, 10 * factor])


def test_frozen_parameters_and_empty_groups_are_left_out_of_the_optimizer():
    frozen, learned = nn.Parameter(torch.ones(1), requires_grad=False), nn.Parameter(torch.ones(1))
    groups = [{"params": [frozen], "lr": 1.0}, {"params": [frozen, learned], "lr": 2.0}]
    optimizer = training.make_optimizer(groups, torch.optim.Adam, betas=(0.9, 0.99))
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.Adam and group["betas"] == (0.9, 0.99)
    assert group["params"] == [learned] and group["peak"] == 2.0


# ---------------------------------------------------------------- one step
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_micro_batches_are_the_batch_in_equal_parts(accumulate):
    processes = training.Processes(accumulate=accumulate)
    batch = {"tokens": torch.arange(24).reshape(8, 3), "images": None}
    parts = list(processes.micro_batches(nn.Linear(1, 1), batch))
    assert [part["tokens"].shape for part in parts] == [(8 // accumulate, 3)] * accumulate
    assert torch.equal(torch.cat([part["tokens"] for part in parts]), batch["tokens"])
    assert all(part.keys() == batch.keys() and part["images"] is None for part in parts)


def test_processes_exchange_gradients_with_the_last_micro_batch_only():
    class Sharded(nn.Linear):
        def set_requires_gradient_sync(self, wanted):
            synced.append(wanted)

    synced = []
    processes = training.Processes(world=2, accumulate=3)
    parts = processes.micro_batches(Sharded(1, 1), {"x": torch.zeros(6, 1)})
    for count, _ in enumerate(parts, 1):
        assert len(synced) == count  # said before the part is used
    assert synced == [False, False, True]


def test_gradients_of_micro_batches_add_up_to_those_of_the_batch():
    torch.manual_seed(0)
    network, batch = nn.Linear(3, 2), {"x": torch.randn(8, 3)}
    network(batch["x"]).square().mean().backward()
    expected = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    for part in training.Processes(accumulate=4).micro_batches(network, batch):
        (network(part["x"]).square().mean() / 4).backward()
    torch.testing.assert_close([p.grad for p in network.parameters()], expected)


@pytest.mark.parametrize("clip", [0.1, 1.0, 1e3])
def test_gradients_are_clipped_as_torch_clips_them(clip):
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    for network in (ours, theirs):
        network.unused = nn.Parameter(torch.ones(2))
        network(torch.ones(4, 5)).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        if a.grad is not None:
            b.grad = a.grad.clone()
    optimizer = training.make_optimizer([{"params": list(ours.parameters()), "lr": 1.0}])
    norm = training.Processes(clip=clip).clip_gradients(optimizer)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip)
    assert norm == pytest.approx(float(expected), rel=1e-6) and 1 < norm < 1e3
    assert ours.unused.grad is None
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(ours, name).grad, getattr(theirs, name).grad)


def test_noise_is_a_function_of_seed_and_step():
    def noise(seed, step):
        training.seed_step(seed, step)
        return torch.randn(4).tolist()

    assert noise(0, 7) == noise(0, 7)
    assert len({tuple(noise(*place)) for place in ((0, 7), (0, 8), (7, 0), (70, 7))}) == 4


def test_processes_share_a_batch_in_equal_parts(capsys):
    assert training.share_of_batch(8, rank=1, world=2, accumulate=1) == slice(4, 8)
    assert training.share_of_batch(8, rank=0, world=2, accumulate=4) == slice(0, 4)
    with pytest.raises(SystemExit) as stop:
        training.share_of_batch(8, rank=1, world=2, accumulate=3)
    assert stop.value.code == 2
    assert "--batch 8: not a multiple of 2 processes x --accumulate 3" in capsys.readouterr().err


def test_a_single_process_gathers_and_averages_its_own():
    processes, rows = training.start_processes(), torch.ones(2, 3)
    assert processes.main and processes.gather(rows) is rows
    assert processes.mean({"loss": 1.5, "codes": 8}) == {"loss": 1.5, "codes": 8}


# ---------------------------------------------------------------- what is due
@pytest.mark.parametrize(
    "every, due", [(4, [4, 8, 10]), (5, [5, 10]), (100, [10]), (1, list(range(1, 11)))]
)
def test_rows_and_checkpoints_are_due_every_so_often_and_at_the_end(tmp_path, every, due):
    run, _, _ = make_run(tmp_path / "run", steps=10, log_every=every, save_every=every)
    assert [step + 1 for step in range(10) if run.log_due(step)] == due
    assert [step + 1 for step in range(10) if run.save_due(step)] == due


def test_without_save_every_only_the_end_is_saved(tmp_path):
    run, _, _ = make_run(tmp_path / "run", steps=10, save_every=0)
    assert [step + 1 for step in range(10) if run.save_due(step)] == [10]


def test_after_a_signal_a_stop_is_requested_and_the_run_ends(tmp_path, capsys):
    run, _, _ = make_run(tmp_path / "run", steps=10, save_every=0)
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(kind) for kind in kinds]
    seen = []
    with pytest.raises(SystemExit) as stop:
        for step, batch in run.steps(iter("abcdefghij"), "letters"):
            seen.append(batch)
            assert not run.stop_requested() and not run.save_due(step)
            if step == 2:
                signal.raise_signal(signal.SIGTERM)
                assert run.stop_requested() and not run.save_due(step)
    assert stop.value.code == 128 + signal.SIGTERM and seen == ["a", "b", "c"]
    assert "stopped by a signal after step 3" in capsys.readouterr().out
    assert [signal.getsignal(kind) for kind in kinds] == before


# ---------------------------------------------------------------- the log and the checkpoints
def test_the_log_has_a_row_per_logged_step(tmp_path):
    run, _, _ = make_run(tmp_path / "run", steps=3, batch=8)
    for step, _ in run.steps(iter(range(3)), "pairs"):
        run.log(step, {"loss": torch.tensor(0.5 + step), "codes": 7})
    run.log_file.close()
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [(row["step"], row["loss"], row["codes"]) for row in rows] == [
        (1, 0.5, 7),
        (2, 1.5, 7),
        (3, 2.5, 7),
    ]
    assert all(row["pairs_per_s"] > 0 and row["seconds"] >= 0 for row in rows)


def test_checkpoints_are_whole_pointed_at_and_pruned(tmp_path, capsys):
    out = tmp_path / "run"
    run, network, optimizer = make_run(out, keep=2)
    (out / ".step_00000003.draft").mkdir(parents=True)  # what a killed process leaves
    for step in (1, 2, 4):
        network.weight.data.fill_(step)
        run.save(step - 1, network, optimizer)
        assert common.latest(out).name == f"step_0000000{step}"
    kept = ["latest", "metrics.jsonl", "step_00000002", "step_00000004"]
    assert sorted(path.name for path in out.iterdir()) == kept
    for path in (out, out / "step_00000004"):
        tensors, meta = common.load_checkpoint(path, "laq", ("quantize",))
        assert tensors["weight"][:].tolist() == [[4, 4]] and meta["step"] == 4
    assert (out / "step_00000004/words.json").read_text() == "[]"

    def refused(words, stage=("quantize",)):
        with pytest.raises(SystemExit) as stop:
            common.load_checkpoint(out, "laq", stage)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and f"--laq {out}" in said and words in said

    refused("'quantize', expected finetune", ("finetune",))
    (out / "step_00000004/config.json").write_text("{")
    refused("unreadable")
    shutil.rmtree(out / "step_00000004")
    refused("no checkpoint")


# ---------------------------------------------------------------- resuming
def test_a_resumed_run_has_its_own_learning_rate_and_kernel(tmp_path):
    run, network, optimizer = make_run(tmp_path / "run")
    optimizer.param_groups[0]["peak"] = 7.0
    for step in range(2):
        network(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        run.save(step, network, optimizer)
    moments = optimizer.state[network.weight]["exp_avg"].clone()
    run.log_file.close()
    again, network, optimizer = make_run(tmp_path / "run", resume=True, bf16=True)
    group = optimizer.param_groups[0]
    assert again.start == 2 and group["fused"] is True and group["peak"] == 0.1
    assert torch.equal(optimizer.state[network.weight]["exp_avg"], moments)


def test_a_resumed_run_forgets_the_rows_after_its_checkpoint(tmp_path):
    run, network, optimizer = make_run(tmp_path / "run")
    for step, _ in run.steps(iter(range(3)), "pairs"):
        run.log(step, {"loss": step})
        if step == 1:
            run.save(step, network, optimizer)
    run.log_file.write('{"step": 2, "lo')  # torn
    run.log_file.close()
    again, _, _ = make_run(tmp_path / "run", resume=True)
    again.log_file.close()
    assert [row["step"] for row in read_jsonl(tmp_path / "run/metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    "line",
    [
        "quantize.py --data DIR/table --held_out 2 --preset tiny",
        f"{PRETRAIN} --laq DIR/laq",
        f"{FINETUNE} --init_from DIR/latent",
        f"{FINETUNE} --init_from DIR/latent --lora_rank 2",
    ],
    ids=["quantize", "pretrain", "finetune", "LoRA"],
)
def test_resuming_changes_nothing(call, tmp_path, line):
    """4 steps in one go equal a run that was killed after its checkpoint of step 2 and resumed"""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    line += " --steps 4 --batch 8 --save_every 2 --log_every 1 --keep 2 --resume true --out"
    assert call(line, straight) == 0
    shutil.copytree(straight / "step_00000002", killed / "step_00000002")
    shutil.copy(straight / "metrics.jsonl", killed)  # it had logged more than it had saved
    (killed / "latest").write_text("step_00000002\n")
    assert call(line, killed) == 0
    early = load_file(straight / "step_00000002/model.safetensors")
    expected, found = (
        load_file(run / "step_00000004/model.safetensors") for run in (straight, killed)
    )
    assert not same_tensors(early, expected) and same_tensors(expected, found)
    expected, found = (
        read_training_state(run / "step_00000004")["optimizer"]["state"]
        for run in (straight, killed)
    )
    assert expected.keys() <= found.keys() and expected
    for name, state in expected.items():
        assert all(torch.equal(value, found[name][key]) for key, value in state.items())
    losses = read_losses(killed)
    assert len(losses) == 4 and losses == read_losses(straight)


OLDER_OPTIONS = {  # of pretrain.py before labels files of actions
    "latents": "",
    "labelled": 100,
    "labelled_data": "",
    "labelled_where": "",
    "idm_steps": 400,
}


@pytest.mark.parametrize("name", ["latent", "idm"])
def test_a_run_of_the_previous_version_is_continued(runs, call, capsys, tmp_path, name):
    """Some options had other names, and the inverse dynamics model was trained by pretrain"""
    ours, older = (shutil.copytree(runs / name, tmp_path / folder) for folder in ("ours", "older"))
    meta = read_config(older)
    del meta["options"]["labels_file"]
    meta["options"] |= OLDER_OPTIONS | {"latent_vocab": meta["model"]["latent_vocab"]}
    mark = meta["identity"].pop("labels_file")
    if name == "latent":
        meta["identity"]["latents"] = mark
    else:
        meta["identity"]["labelled_data"] = meta["identity"]["dataset"]
    (common.latest(older) / "config.json").write_text(json.dumps(meta))
    for run in (ours, older):
        assert call(COMMANDS[name], "--out", run, "--resume", "true", "--steps", 3) == 0
        assert f"resuming {run} at step 2" in capsys.readouterr().out
        assert common.latest(run).name == "step_00000003"
    assert same_tensors(read_weights(ours), read_weights(older))
    assert not same_tensors(read_weights(older), read_weights(runs / name))
    assert read_config(older)["options"].keys() == read_config(ours)["options"].keys()


def test_the_same_file_spelled_otherwise_is_resumed(runs, call, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    line = f"pretrain.py {SHORT} --held_out 2 --labels latent --out OUT"
    inputs = "--data table --laq laq --labels_file laq/labels.safetensors --init_from base"
    assert call(f"{line} {inputs}") == 0
    line += " --resume true"
    inputs = "--data ./table/ --laq DIR/laq/ --init_from DIR/base --labels_file"
    assert call(f"{line} {inputs} ./laq/labels.safetensors --steps 3") == 0
    assert "resuming" in capsys.readouterr().out
    dataset = data.open_dataset("table", 64)
    labels, meta = data.load_labels("laq/labels.safetensors", dataset, dataset.episodes)
    names = [episode.id for episode in dataset.episodes]
    other = {name: 7 - codes for name, codes in zip(names, labels, strict=True)}
    data.save_labels(tmp_path / "other.safetensors", other, meta)
    assert call(f"{line} {inputs}", tmp_path / "other.safetensors", "--steps", 4) == 2
    assert "was made with labels_file = " in capsys.readouterr().err


# ---------------------------------------------------------------- another run is refused
@pytest.mark.parametrize("name", ["laq", "latent", "LAPA"])
def test_a_finished_run_is_not_overwritten_nor_continued_as_another(runs, call, capsys, name):
    def times():
        return {path: path.stat().st_mtime_ns for path in (runs / name).rglob("*")}

    before = times()
    for more, words in (((), "--resume"), (("--resume", "true", "--seed", 5), "seed")):
        assert call(COMMANDS[name], *more) == 2
        said = capsys.readouterr().err
        assert words in said and len(said) < 2000 and times() == before


@pytest.mark.parametrize(
    "name, option, value, said",
    [
        ("laq", "heads", 2, "heads = 4, this run has 2"),
        ("laq", "held_out", 3, "held_out = 2, this run has 3"),
        ("latent", "template", "do {instruction}", "template = {instruction}, this run has do"),
        ("LAPA", "shift", 0, "shift = 0.0625, this run has 0"),
    ],
)
def test_what_is_resumed_is_the_same_run(call, capsys, name, option, value, said):
    assert call(COMMANDS[name], "--resume", "true", f"--{option}", value) == 2
    assert f"was made with {said}" in capsys.readouterr().err


def test_a_run_is_not_continued_backwards(call, capsys):
    assert call(COMMANDS["laq"], "--resume", "true", "--steps", 1) == 2
    assert "--steps 1: " in capsys.readouterr().err


def test_bins_do_not_change_under_a_run(runs, call, tmp_path, capsys):
    """A run of older code, whose bins are not those that today's code cuts"""
    run = shutil.copytree(runs / "SCRATCH", tmp_path / "run")
    meta = read_config(run)
    halved = meta | {"bins": [edges[::2] for edges in meta["bins"]]}
    (common.latest(run) / "config.json").write_text(json.dumps(halved))
    assert call(COMMANDS["SCRATCH"], "--out", run, "--resume", "true", "--steps", 3) == 2
    assert "other action bins" in capsys.readouterr().err


def test_a_second_run_into_a_folder_in_use_is_refused(runs, start, tmp_path):
    """Also before there is a checkpoint, and when it would resume"""
    run, _, _ = make_run(tmp_path / "run")
    line = fill_in(f"quantize.py {SHORT} --data DIR/table --held_out 2 --out", {"DIR": runs})
    for more in ((), ("--resume", "true")):
        done = start(*line.split(), tmp_path / "run", *more)
        assert done.returncode == 2 and "another run is writing into this folder" in done.stderr
    run.log_file.close()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["metrics.jsonl"]


# ---------------------------------------------------------------- machines and losses that fail
@pytest.mark.parametrize(
    "error",
    [
        CheckpointException("save", {0: (OSError(errno.ENOSPC, "No space left on device"), None)}),
        RuntimeError("unexpected pos 64 vs 0"),
    ],
    ids=["several processes'", "torch's"],
)
def test_a_full_disk_is_named_whatever_hides_it(tmp_path, monkeypatch, capsys, error):
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")

    def full(*args, **named):
        raise error

    run, network, optimizer = make_run(tmp_path / "run")
    monkeypatch.setattr(training.dcp, "save", full)
    with pytest.raises(SystemExit) as stop:
        run.save(0, network, optimizer)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "No space left on device" in said and said.count("\n") == 1


def test_a_full_disk_leaves_the_last_checkpoint(runs, start, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "none", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small tmpfs")
    try:
        line = f"quantize.py {SHORT} --steps 20 --data DIR/table --held_out 2 --out DISK/out"
        line = fill_in(line, {"DIR": runs, "DISK": disk})
        done = start(*line.split(), "--keep", 99, "--save_every", 1)
        assert done.returncode == 2
        error = done.stderr.splitlines()[-1]
        assert "not written" in error and "Traceback" not in done.stderr
        assert str(common.latest(disk / "out")) in error
        weights, meta = common.load_checkpoint(disk / "out", "out", ("quantize",))
        assert 0 < meta["step"] < 20 and all(w[:].isfinite().all() for w in weights.values())
        assert not list((disk / "out").glob(".step*"))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_loss_that_is_not_finite_names_the_episodes(runs, start, tmp_path):
    line = f"pretrain.py {SHORT} --steps 20 --data DIR/table --held_out 2 --laq DIR/laq --out"
    line = fill_in(line, {"DIR": runs})
    done = start(*line.split(), tmp_path / "out", "--lr", 10**15, "--save_every", 1)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert error.startswith(("error: the loss is ", "error: the gradient norm is "))
    assert "episodes robot_000" in error
    assert "last good checkpoint" in error and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["laq", "latent", "LAPA"])
@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_leaves_no_checkpoint(
    runs, inside, tmp_path, monkeypatch, capsys, name, norm
):
    """A finite loss can have such a gradient: the step would spoil the weights, and save them"""
    monkeypatch.setattr(training.Processes, "clip_gradients", lambda self, optimizer: norm)
    line = fill_in(COMMANDS[name], {"DIR": runs}).split()
    assert inside(*line, "--out", tmp_path / "out", "--save_every", 1) == 2
    said = capsys.readouterr().err
    assert f"error: the gradient norm is {norm}: step 0, episodes robot_000" in said
    assert not list((tmp_path / "out").glob("step_*"))


def test_compiling_without_a_compiler_is_one_line(runs, start, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    line = f"quantize.py {SHORT} --compile true --held_out 2 --data DIR/table --out"
    done = start(*fill_in(line, {"DIR": runs}).split(), tmp_path / "q")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert done.stderr.splitlines()[-1].startswith("error: --compile: torch.compile does not work")
    assert "Traceback" not in done.stderr and not (tmp_path / "q/latest").exists()
