"""The stages' own command lines, end to end on a budget of two steps, and what they refuse; what
they share (options, checkpoints, resuming); the repository's own rules."""

import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import common
import data
import evaluate
import finetune
import pretrain
import quantize
import sequences
import training
from analysis import atlas
from model import LAQ, LAQConfig

SHORT = "--preset tiny --steps 2 --batch 8 --log_every 1"
PRETRAIN = f"pretrain.py {SHORT} --data DIR/table --held_out 2 --init_from DIR/base"
FINETUNE = f"finetune.py {SHORT} --held_out 2 --labelled 6 --data DIR/table"
LABELLED = "--laq DIR/laq --data DIR/table"
WAVES = [  # what stands in one wave runs side by side
    {
        "table": "-m simulators.tabletop DIR/table --episodes 12",
        "scenes": "-m simulators.tabletop DIR/scenes --scenes 200 --seed 2",
    },
    {
        "check": "data.py check DIR/table",
        "laq": f"quantize.py {SHORT} --data DIR/table --out DIR/laq --held_out 2",
        "base": f"pretrain.py {SHORT} --labels caption --data DIR/scenes --out DIR/base",
        "guesses": "-m baselines.inverse_dynamics --preset tiny --steps 2 --data DIR/table "
        "--held_out 2 --labelled 6 --out DIR/guesses.safetensors",
    },
    {
        "label": f"quantize.py label {LABELLED} --out DIR/labels.safetensors",
        "report": f"quantize.py report {LABELLED} --out DIR/report --held_out 2",
        "latent": f"{PRETRAIN} --labels latent --laq DIR/laq --out DIR/latent",
        "action": f"{PRETRAIN} --labels action --out DIR/action",
        "idm": f"{PRETRAIN} --labels idm --labels_file DIR/guesses.safetensors --out DIR/idm",
    },
    {
        "LAPA": f"{FINETUNE} --init_from DIR/latent --out DIR/LAPA",
        "SCRATCH": f"{FINETUNE} --init_from DIR/base --out DIR/SCRATCH",
        "ACTIONVLA": f"{FINETUNE} --init_from DIR/action --out DIR/ACTIONVLA",
    },
    {
        "evaluate": "evaluate.py --policies LAPA=DIR/LAPA,SCRATCH=DIR/SCRATCH,RANDOM=random,"
        "EXPERT=expert --out DIR/evaluate --episodes 5 --batch 3 --film 2 --max_steps 5"
    },
    {"means": "evaluate.py table --results DIR/evaluate/results.json --out DIR/means/table.md"},
]
COMMANDS = {name: line for wave in WAVES for name, line in wave.items()}


@pytest.fixture(scope="session")
def runs(tmp_path_factory, start):
    """-> the folder of all runs, and {name: finished process}"""
    folder, done = tmp_path_factory.mktemp("runs"), {}
    work = lambda line: start(*line.replace("DIR", str(folder)).split())
    with ThreadPoolExecutor(2) as pool:
        for wave in WAVES:
            done.update(zip(wave, pool.map(work, wave.values())))
    return folder, done


def weights(run, file="model.safetensors", read=load_file):
    return read(common.latest(run) / file)


# ---------------------------------------------------------------- every stage, once
@pytest.mark.parametrize("name", COMMANDS)
def test_command_succeeds_and_writes_what_it_says(runs, name):
    done = runs[1][name]
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert {"check": "no defects"}.get(name, "wrote") in done.stdout
    for line in done.stdout.splitlines():
        for path in line.split(":")[0][6:].split(", ") if line.startswith("wrote ") else ():
            assert Path(path).exists(), path


def finite(value):
    """Every number in nested lists and dictionaries is finite"""
    if isinstance(value, (list, dict)):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or np.isfinite(value)


@pytest.mark.parametrize(
    "path, keys",
    [
        (
            "laq/report",
            "pairs codes_used perplexity psnr_above_copy psnr_lost_by_shuffling probe_r2",
        ),
        ("report/report", "pairs psnr probe_r2_shuffled"),
        ("laq/summary", "seconds"),
        ("base/summary", "loss val_loss"),
        ("latent/summary", "loss val_loss accuracy"),
        ("action/summary", "loss"),
        ("idm/summary", "loss"),
        ("LAPA/summary", "loss accuracy"),
        ("SCRATCH/summary", "loss"),
        ("evaluate/results", "arms options"),
    ],
)
def test_figures_are_there_and_finite(runs, path, keys):
    found = json.loads((runs[0] / f"{path}.json").read_text())
    assert set(keys.split()) <= found.keys() and finite(found)


def test_pictures_film_and_labels(runs):
    for path in ("laq/atlas.png", "laq/reconstructions.png", "report/atlas.png"):
        with Image.open(runs[0] / path) as picture:
            assert picture.width > 200 and picture.convert("L").getextrema()[0] < 128
    with Image.open(runs[0] / "evaluate/rollouts.gif") as film:
        assert film.n_frames == 5 + 1  # max_steps, and the start
    rows = [json.loads(x) for x in (runs[0] / "table/episodes.jsonl").read_text().splitlines()]
    labels, again = (load_file(runs[0] / f"{p}.safetensors") for p in ("laq/labels", "labels"))
    assert {n: len(z) for n, z in labels.items()} == {r["id"]: r["frames"] for r in rows}
    assert all(z.shape[1] == 4 and int(z.long().max()) < 8 for z in labels.values())
    assert all(torch.equal(z, again[n]) for n, z in labels.items())  # by the run and the command


def test_labels_are_made_in_the_precision_of_training(runs, inside, tmp_path, monkeypatch):
    made, label = [], LAQ.label
    monkeypatch.setattr(
        LAQ,
        "label",
        lambda net, pair: (made.append(torch.is_autocast_enabled("cpu")), label(net, pair))[1],
    )
    line = f"quantize.py {SHORT} --data {runs[0]}/table --held_out 2 --bf16"
    for bf16 in ("true", "false"):
        out = tmp_path / bf16
        assert inside(*line.split(), bf16, "--out", out) == 0
        assert (
            inside(
                "quantize.py",
                "label",
                "--laq",
                out,
                "--data",
                runs[0] / "table",
                "--out",
                f"{out}.safetensors",
            )
            == 0
        )
        assert made and set(made) == {bf16 == "true"}
        one, two = load_file(out / "labels.safetensors"), load_file(f"{out}.safetensors")
        assert all(torch.equal(z, two[name]) for name, z in one.items())
        made.clear()


def test_finetuning_inherits_the_body_and_keeps_vision_frozen(runs):
    base, latent, policy, action, kept = (
        weights(runs[0] / n) for n in ("base", "latent", "LAPA", "action", "ACTIONVLA")
    )
    for name in ("patch_embed.weight", "patch_position"):
        assert torch.equal(base[name], latent[name]) and torch.equal(base[name], policy[name])
    heads = lambda tensors: {name for name in tensors if name.endswith("n_head.weight")}
    assert "latent_head.weight" in latent and "latent_head.weight" not in policy
    assert heads(policy) == {"action_head.weight"} and not heads(latent)
    for a, b, name in ((latent, policy, "norm.weight"), (action, kept, "action_head.weight")):
        assert 0 < (a[name] - b[name]).abs().max() < 5e-3  # two small steps, not a new tensor
    bins = [
        weights(runs[0] / n, "config.json", lambda p: json.loads(p.read_text())["bins"])
        for n in ("action", "ACTIONVLA", "LAPA")
    ]
    assert bins[0] == bins[1] != bins[2]  # ACTIONVLA keeps its bins with its head


@pytest.mark.parametrize(
    "init, more", [("latent", ""), ("action", ""), ("latent", " --bf16 true --checkpointing true")]
)
def test_low_rank_finetuning_exports_merged_weights(runs, inside, tmp_path, init, more):
    line = f"{FINETUNE} --init_from DIR/{init} --lora_rank 2 --out {tmp_path}/lora{more}"
    assert inside(*line.replace("DIR", str(runs[0])).split()) == 0
    before, after, full = map(weights, (runs[0] / init, tmp_path / "lora", runs[0] / "LAPA"))
    assert {n: w.shape for n, w in after.items()} == {n: w.shape for n, w in full.items()}
    for name in after.keys() & before.keys():
        change = after[name] - before[name]
        if name.startswith("layers.") and change.dim() == 2:
            assert 1 <= torch.linalg.matrix_rank(change, rtol=1e-3) <= 2, name
        else:
            assert name in ("text_embed.weight", "action_head.weight") or not change.any(), name
    assert init == "latent" or (after["action_head.weight"] != before["action_head.weight"]).any()
    learned = training_state(common.latest(tmp_path / "lora"))["optimizer"]["state"]
    assert all(name.endswith((".up", ".down", "action_head.weight")) for name in learned)
    assert len(learned) == 4 * 7 * 2 + 1
    line = line.replace("DIR", str(runs[0])).replace("--lora_rank 2", "--resume true --steps 4")
    assert inside(*line.split()) == 2  # continued as another
    assert (
        inside(
            *f"evaluate.py --policies A={tmp_path}/lora --out {tmp_path}/e --episodes 2 "
            "--max_steps 2 --bf16 true".split()
        )
        == 0
    )


def test_evaluation_counts_every_policy_and_split(runs, inside, tmp_path):
    arms = json.loads((runs[0] / "evaluate/results.json").read_text())["arms"]
    assert list(arms) == ["LAPA", "SCRATCH", "RANDOM", "EXPERT"]
    for row in (arm[split] for arm in arms.values() for split in ("seen", "unseen")):
        p = row["success"] / 100
        assert row["n"] == 5 == sum(f["n"] for f in row["families"].values())
        assert row["se"] == pytest.approx(100 * (p * (1 - p) / 5) ** 0.5, abs=0.01)
    assert (
        inside(
            "evaluate.py",
            "--policies",
            "E=expert",
            "--out",
            tmp_path,
            "--episodes",
            40,
            "--film",
            0,
        )
        == 0
    )
    arm = json.loads((tmp_path / "results.json").read_text())["arms"]["E"]
    assert arm["seen"]["success"] == arm["unseen"]["success"] == 100


# ---------------------------------------------------------------- refusals
@pytest.fixture(scope="session")
def broken(runs, tmp_path_factory):
    """Variants of the runs' output that a stage must not accept"""
    bad = tmp_path_factory.mktemp("broken") / "all"
    shutil.copytree(runs[0], bad)
    path = common.latest(bad / "laq") / "model.safetensors"
    save_file({k: w + 1e-3 for k, w in load_file(path).items()}, path)  # the labels stay
    path = common.latest(bad / "LAPA") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    for path in (bad / "table/actions").iterdir():
        np.save(path, np.load(path)[:, [0, 1, 0]])
    with safe_open(bad / "laq/labels.safetensors", "numpy") as file:
        meta = json.loads(file.metadata()["meta"])
        labels = {n: file.get_tensor(n) for n in file.keys()}
    data.save_labels(bad / "laq/labels.safetensors", labels, {**meta, "dataset": "0" * 12})
    return bad


REFUSALS = [
    ("quantize.py --dta DIR/table --out OUT", "--dta"),
    (f"quantize.py {SHORT} --data DIR/none --out OUT", "DIR/none"),
    (f"quantize.py {SHORT} --data DIR/table --out OUT --held_out 12", "nothing left"),
    (f"quantize.py {SHORT} --data DIR/table --out OUT --code_len 3", "code_len"),
    (f"{PRETRAIN} --laq DIR/none --out OUT", "--laq DIR/none"),
    (f"{PRETRAIN} --labels guess --out OUT", "--labels 'guess'"),
    # labels of another LAQ
    (f"{PRETRAIN} --laq BAD/laq --labels_file DIR/labels.safetensors --out OUT", "label again"),
    (
        f"{PRETRAIN} --laq DIR/laq --labels_file BAD/laq/labels.safetensors --out OUT",
        "another dataset",
    ),
    (f"{PRETRAIN} --labels caption --out OUT", "field captions"),
    (f"{PRETRAIN} --labels action --out OUT --dim 64", "--dim 64"),
    (f"{PRETRAIN} --labels action --out OUT --image_size 16", "--image_size 16"),
    (f"{PRETRAIN} --labels action --out OUT --text_vocab 9", "--text_vocab"),
    (f"{PRETRAIN} --labels action --out OUT --binary 2", "--binary '2'"),
    (f"{PRETRAIN} --labels action --out OUT --log_every 0", "--log_every: '0'"),
    (f"{PRETRAIN} --labels action --out OUT --seed {2**64}", "--seed"),
    (f"{PRETRAIN} --labels action --out OUT --template words", "--template"),
    (f"{PRETRAIN} --labels action --out DIR/table/episodes.jsonl", "episodes.jsonl"),
    (f"{FINETUNE} --init_from DIR/none --out OUT", "--init_from DIR/none"),
    (f"{FINETUNE} --init_from DIR/laq --out OUT", "--init_from DIR/laq"),
    (f"{FINETUNE} --init_from DIR/action --out OUT --data BAD/table", "width 3"),
    (f"{FINETUNE} --init_from DIR/base --out OUT --data DIR/scenes", "only 0 episodes"),
    (f"{FINETUNE} --init_from DIR/base --out OUT --labelled 99", "--labelled 99"),
    ("evaluate.py --policies A=expert,B=DIR/none --out OUT", "DIR/none"),
    ("evaluate.py --policies A=DIR/latent --out OUT", "DIR/latent"),
    ("evaluate.py --policies A=BAD/LAPA --out OUT", "BAD/LAPA"),
    ("evaluate.py --policies A=expert --splits hidden --out OUT", "hidden"),
    ("evaluate.py table --results DIR/none --out OUT", "--results DIR/none"),
    ("-m simulators.tabletop OUT --look grey", "look"),
    ("-m simulators.tabletop DIR/table", "table exists"),
]


@pytest.mark.parametrize("line, words", REFUSALS, ids=[words for _, words in REFUSALS])
def test_refusal(runs, broken, inside, capsys, tmp_path, line, words):
    for name, folder in (("DIR", runs[0]), ("BAD", broken), ("OUT", tmp_path / "out")):
        line, words = line.replace(name, str(folder)), words.replace(name, str(folder))
    assert inside(*line.split()) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and words in said and len(said) < 2000
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize("name", ["laq", "latent", "LAPA"])
def test_a_finished_run_is_not_overwritten_nor_continued_as_another(runs, inside, capsys, name):
    files = lambda: {p: p.stat().st_mtime_ns for p in (runs[0] / name).rglob("*")}
    line, before = COMMANDS[name].replace("DIR", str(runs[0])).split(), files()
    for more, words in (((), "--resume"), (("--resume", "true", "--seed", 5), "seed")):
        assert inside(*line, *more) == 2
        said = capsys.readouterr().err
        assert words in said and len(said) < 2000 and files() == before


@pytest.mark.parametrize(
    "name, option, value, said",
    [
        ("laq", "heads", 2, "heads = 4, this run has 2"),
        ("laq", "held_out", 3, "held_out = 2, this run has 3"),
        ("latent", "template", "do {instruction}", "template = {instruction}, this run has do"),
        ("LAPA", "shift", 0, "shift = 0.0625, this run has 0"),
    ],
)
def test_what_is_resumed_is_the_same_run(runs, inside, capsys, name, option, value, said):
    line = COMMANDS[name].replace("DIR", str(runs[0])).split()
    assert inside(*line, "--resume", "true", f"--{option}", value) == 2
    assert f"was made with {said}" in capsys.readouterr().err


def test_a_preset_uses_what_labelled_episodes_there_are(runs, inside, capsys, tmp_path):
    mixed = shutil.copytree(runs[0] / "table", tmp_path / "mixed")
    rows = [json.loads(x) for x in (mixed / "episodes.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        del row["actions"]
    (mixed / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    left = [e for e in data.open_dataset(mixed, 64).split(2)[0] if e.actions is not None]
    line = COMMANDS["SCRATCH"].replace("DIR", str(runs[0])).replace("--labelled 6 ", "").split()
    line += ["--data", mixed, "--out", tmp_path / "run"]
    assert inside(*line) == 0 and 4 <= len(left) <= 6  # the preset asks for 100
    assert f"\n{len(left)} labelled episodes" in capsys.readouterr().out
    assert inside(*line, "--labelled", 7) == 2
    assert f"only {len(left)} episodes with actions" in capsys.readouterr().err


def test_errors_end_a_process_with_code_2_and_one_line(start, tmp_path):
    done = start("quantize.py", "--data", tmp_path / "none", "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- options
@dataclass(kw_only=True)
class Options:
    out: str = common.option(help="where to write")
    preset: str = common.option("small", "named size")
    steps: int = common.option(10, "how many steps")
    rate: float = common.option(0.5, "learning rate, at its peak")
    resume: bool = common.option(False, "continue")


PRESETS = {"small": {"steps": 3}, "large": {"steps": 1000, "rate": 0.1}}


def parse(line):
    return common.parse_options(Options, line.split(), PRESETS)


@pytest.mark.parametrize(
    "line, words",
    [
        ("--out x --speed 3", "--speed"),
        ("--out x --steps 1.5", "--steps: '1.5'"),
        ("--out x --rate fast", "--rate: 'fast'"),
        ("--out x --resume maybe", "--resume: 'maybe'"),
        ("--out x --steps", "--steps: expected"),
        ("--out --steps 3", "--out: expected"),
        ("--steps 3", "--out is required"),
        ("--out x --preset huge", "--preset 'huge'"),
        ("x", "'x'"),
        ("--out x --steps -3", "--steps: '-3'"),
        ("--out x --rate nan", "--rate: 'nan'"),
    ],
)
def test_wrong_options_are_refused_by_name(capsys, line, words):
    with pytest.raises(SystemExit) as stop:
        parse(line)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and words in said
    assert said.count("\n") == 1


def test_named_options_beat_the_preset_which_beats_the_defaults():
    options, given = parse("--preset large --rate=2e-1 --out a=b --resume yes")
    assert options == Options(out="a=b", preset="large", steps=1000, rate=0.2, resume=True)
    assert given == {"preset", "rate", "out", "resume"}
    assert parse("--out x")[0].steps == 3 and parse("--out x --steps 1_000")[0].steps == 1000
    values = [parse(f"--out x --resume {word}")[0].resume for word in ("true", "1", "False", "no")]
    assert values == [True, True, False, False]


def test_help_lists_every_option_with_its_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for words in (
        "--out required where to write",
        "--rate 0.5 learning rate, at its peak",
        "--resume False continue",
        "preset large: --steps 1000 --rate 0.1",
    ):
        assert words in said


@pytest.mark.parametrize("module", [quantize, pretrain, finetune, evaluate])
def test_help_of_the_stages(module, inside, capsys):
    cls = getattr(module, module.__name__.capitalize() + "Config")
    assert inside(f"{module.__name__}.py", "--help") == 0
    said = capsys.readouterr().out
    for field in fields(cls):
        help = field.metadata["help"]
        assert help and f"  --{field.name} " in said and help in " ".join(said.split()), field.name
    for preset, values in getattr(module, "PRESETS", {}).items():
        assert f"preset {preset}:" in said
        assert values.keys() <= {field.name for field in fields(cls)}


# ---------------------------------------------------------------- checkpoints and resuming
def training_state(checkpoint):
    dcp_to_torch_save(checkpoint / "training", checkpoint / "x.pt")
    return torch.load(checkpoint / "x.pt")


def make_run(out, **more):
    """A Run of a network of one weight, that network, and its optimizer"""
    c = quantize.QuantizeConfig(data="", out=str(out), steps=10**6, save_every=1, **more)
    net = torch.nn.Linear(2, 1, bias=False)
    processes = training.start_processes()
    run = training.Run(c, processes, "quantize", LAQConfig(), {}, files={"words.json": "[]"})
    optimizer = training.make_optimizer([{"params": list(net.parameters()), "lr": 0.1}])
    run.resume(net, optimizer)
    return run, net, optimizer


def test_a_resumed_run_has_its_own_learning_rate_and_kernel(tmp_path):
    run, net, optimizer = make_run(tmp_path / "run")
    optimizer.param_groups[0]["peak"] = 7.0
    for step in range(2):
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        run.save(step, net, optimizer)
    moments = optimizer.state[net.weight]["exp_avg"].clone()
    run.log_file.close()
    again, net, optimizer = make_run(tmp_path / "run", resume=True, bf16=True)
    group = optimizer.param_groups[0]
    assert again.start == 2 and group["fused"] is True and group["peak"] == 0.1
    assert torch.equal(optimizer.state[net.weight]["exp_avg"], moments)


def test_checkpoints_are_whole_pointed_at_and_pruned(tmp_path, capsys):
    out = tmp_path / "run"
    run, net, optimizer = make_run(out, keep=2)
    (out / ".step_00000003.draft").mkdir(parents=True)  # what a killed process leaves
    for step in (1, 2, 4):
        net.weight.data.fill_(step)
        run.save(step - 1, net, optimizer)
        assert common.latest(out).name == f"step_0000000{step}"
    assert sorted(p.name for p in out.iterdir()) == [
        "latest",
        "metrics.jsonl",
        "step_00000002",
        "step_00000004",
    ]
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
def test_resuming_changes_nothing(runs, inside, tmp_path, line):
    """4 steps in one go equal a run that was killed after its checkpoint of step 2 and resumed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    line = (
        line.replace("DIR", str(runs[0])).split()
        + "--steps 4 --batch 8 --save_every 2 --log_every 1 --keep 2 --resume true --out".split()
    )
    assert inside(*line, whole) == 0
    shutil.copytree(whole / "step_00000002", killed / "step_00000002")
    shutil.copy(whole / "metrics.jsonl", killed)  # it had logged more than it had saved
    (killed / "latest").write_text("step_00000002\n")
    assert inside(*line, killed) == 0
    early, one, two = (
        load_file(p / "model.safetensors")
        for p in (whole / "step_00000002", whole / "step_00000004", killed / "step_00000004")
    )
    assert any(not torch.equal(w, early[name]) for name, w in one.items())
    assert all(torch.equal(w, two[name]) for name, w in one.items())
    one, two = (training_state(run / "step_00000004")["optimizer"] for run in (whole, killed))
    assert one["state"].keys() <= two["state"].keys() and one["state"]
    for key, state in one["state"].items():
        assert all(torch.equal(v, two["state"][key][k]) for k, v in state.items())
    one, two = (
        [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, killed)
    )
    assert [row["step"] for row in two] == [1, 2, 3, 4]
    assert [row["loss"] for row in one] == [row["loss"] for row in two]


# ---------------------------------------------------------------- what happens on other machines
def test_a_second_run_into_a_folder_in_use_is_refused(runs, start, tmp_path):
    """Also before there is a checkpoint, and when it would resume"""
    run, _, _ = make_run(tmp_path / "run")
    for more in ((), ("--resume", "true")):
        done = start(
            "quantize.py",
            "--data",
            runs[0] / "table",
            "--out",
            tmp_path / "run",
            "--preset",
            "tiny",
            "--steps",
            2,
            "--held_out",
            2,
            *more,
        )
        assert done.returncode == 2 and "another run is writing into this folder" in done.stderr
    run.log_file.close()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["metrics.jsonl"]


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

    run, net, optimizer = make_run(tmp_path / "run")
    monkeypatch.setattr(training.dcp, "save", full)
    with pytest.raises(SystemExit) as stop:
        run.save(0, net, optimizer)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "No space left on device" in said and said.count("\n") == 1


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    def full(self, *args, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SystemExit) as stop:
        atlas.contact_sheet({"x": torch.zeros(2, 3, 8, 8)}, tmp_path / "x.gif")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.endswith("x.gif: not written: No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_a_dimension_that_never_moves_leaves_valid_json(runs, inside, tmp_path, capsys, recwarn):
    still = shutil.copytree(runs[0] / "table", tmp_path / "still")
    for path in (still / "actions").iterdir():
        np.save(path, np.load(path) * np.float32([0, 1]))
    assert (
        inside(
            *f"quantize.py {SHORT} --held_out 2".split(), "--data", still, "--out", tmp_path / "q"
        )
        == 0
    )
    guesses = tmp_path / "guesses.safetensors"
    line = "--preset tiny --labelled 6 --steps 2 --held_out 2".split()
    assert inside("-m", "baselines.inverse_dynamics", *line, "--data", still, "--out", guesses) == 0
    assert "held-out episodes: [None, " in capsys.readouterr().out
    line = f"pretrain.py {SHORT} --labels idm --held_out 2".split()
    line += ["--labels_file", guesses, "--data", still, "--init_from", runs[0] / "base"]
    assert inside(*line, "--out", tmp_path / "p") == 0
    assert "1 (always 0)" in capsys.readouterr().out

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    for path in tmp_path.rglob("*.json*"):
        text = path.read_text()
        for text in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(text, parse_constant=refuse)
    card = json.loads((tmp_path / "q/report.json").read_text())
    assert card["probe_r2"][0] is None and isinstance(card["probe_r2"][1], float)
    assert "| probe r2 | never moves, " in (tmp_path / "q/report.md").read_text()
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_numbers_that_json_does_not_have_become_null():
    value = {"a": [float("nan"), (1.5, float("inf"))], "b": "NaN", "c": {"d": -float("inf")}}
    assert common.to_json(value) == '{"a": [null, [1.5, null]], "b": "NaN", "c": {"d": null}}'


def test_other_alphabets_under_an_old_locale(runs, tmp_path):
    """Checkpoints, labels and output, in a process whose own encoding is ASCII"""
    words = shutil.copytree(runs[0] / "table", tmp_path / "öffne")
    text = (words / "episodes.jsonl").read_text(encoding="utf-8")
    rows = [{**json.loads(line), "instruction": "öffne 打开抽屉"} for line in text.splitlines()]
    for i, row in enumerate(rows):
        (words / row["video"]).rename(words / f"videos/bär{i}.npy")
        row["video"] = f"videos/bär{i}.npy"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (words / "episodes.jsonl").write_text(lines, encoding="utf-8")
    (words / "tokenizer.json").unlink()
    env = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "LAPA_CACHE": str(tmp_path / "cache"),
    }
    pretrain_line = f"pretrain.py {SHORT} --held_out 2 --labels action"
    for line, more in (
        (pretrain_line, ("--out", tmp_path / "p")),
        (
            f"{FINETUNE.partition(' --data')[0]}",
            ("--init_from", tmp_path / "p", "--out", tmp_path / "f"),
        ),
    ):
        line = [sys.executable, *line.split(), "--data", words, *more]
        done = subprocess.run(
            [str(word).encode() for word in line], cwd=ROOT, env=env, capture_output=True
        )
        assert done.returncode == 0, done.stderr
    tokenizer = sequences.read_tokenizer(tmp_path / "f")
    known = tokenizer.encode("öffne 打开抽屉", add_special_tokens=False)
    assert known.tokens == ["öffne", "打开抽屉"]


def test_the_same_file_spelled_otherwise_is_resumed(runs, inside, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(runs[0])
    line = [*f"pretrain.py {SHORT} --held_out 2 --labels latent".split(), "--out", tmp_path / "p"]
    spelled = [
        "--data table --laq laq --labels_file laq/labels.safetensors --init_from base",
        f"--data ./table/ --laq {runs[0]}/laq/ --labels_file ./laq/labels.safetensors "
        f"--init_from {runs[0]}/base",
    ]
    assert inside(*line, *spelled[0].split()) == 0
    assert inside(*line, *spelled[1].split(), "--resume", "true", "--steps", 3) == 0
    assert "resuming" in capsys.readouterr().out
    shutil.copy(common.latest(runs[0] / "laq") / "config.json", tmp_path)
    changed = tmp_path / "changed.safetensors"
    labels, meta = data.load_labels(
        runs[0] / "laq/labels.safetensors",
        *(lambda d: (d, d.episodes))(data.open_dataset("table", 64)),
    )
    ids = [e.id for e in data.open_dataset("table", 64).episodes]
    data.save_labels(changed, {name: 7 - rows for name, rows in zip(ids, labels)}, meta)
    other = spelled[1].replace("./laq/labels.safetensors", str(changed))
    assert inside(*line, *other.split(), "--resume", "true", "--steps", 4) == 2
    assert "was made with labels_file = " in capsys.readouterr().err


def test_bins_do_not_change_under_a_run(runs, inside, tmp_path, capsys):
    """A run of older code, whose bins today's code would cut otherwise"""
    run = shutil.copytree(runs[0] / "SCRATCH", tmp_path / "run")
    path = common.latest(run) / "config.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"bins": [edges[::2] for edges in meta["bins"]]}))
    line = COMMANDS["SCRATCH"].replace("DIR", str(runs[0])).split()
    assert inside(*line, "--out", run, "--resume", "true", "--steps", 3) == 2
    assert "other action bins" in capsys.readouterr().err


def test_a_policy_may_lie_in_a_folder_with_a_comma(runs, inside, tmp_path):
    shutil.copytree(runs[0] / "LAPA", tmp_path / "a,b")
    assert (
        inside(
            "evaluate.py",
            "--policies",
            f"A={tmp_path}/a,b,B=random",
            "--episodes",
            2,
            "--max_steps",
            1,
            "--film",
            0,
            "--out",
            tmp_path / "e",
        )
        == 0
    )


def test_compiling_without_a_compiler_is_one_line(runs, start, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    done = start(
        *f"quantize.py {SHORT} --compile true --held_out 2".split(),
        "--data",
        runs[0] / "table",
        "--out",
        tmp_path / "q",
    )
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert done.stderr.splitlines()[-1].startswith("error: --compile: torch.compile does not work")
    assert "Traceback" not in done.stderr and not (tmp_path / "q/latest").exists()


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize(
    "data_folder, out",
    [
        ("my films", "runs/x"),
        ("films", "my runs/a (1)"),
        ("it's", "runs/x"),
        ("a & b", "runs/12:30"),
    ],
)
def test_make_takes_folders_with_blanks(tmp_path, data_folder, out):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/ready").touch()
    (tmp_path / "requirements.txt").touch()
    os.utime(tmp_path / "requirements.txt", (0, 0))
    (tmp_path / data_folder).mkdir()
    (tmp_path / data_folder / "episodes.jsonl").touch()
    said = tmp_path / "said"
    python = tmp_path / ".venv/bin/python"  # says what it was given, one word a line, and makes it
    python.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\nwords = sys.argv[1:]\n"
        f'open({str(said)!r}, "a").write("\\n".join(words) + "\\n")\n'
        'out = pathlib.Path(words[words.index("--out") + 1])\n'
        'out.mkdir(parents=True)\n(out / "summary.json").touch()\n'
    )
    python.chmod(0o755)
    command = ["make", "quantize", "pretrain", "finetune", f"DATA={data_folder}", f"OUT={out}"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    words = said.read_text().splitlines()
    assert [w for w in words if w.endswith(".py")] == ["quantize.py", "pretrain.py", "finetune.py"]
    assert words.count(data_folder) == 3 and words.count(f"{out}/quantize") == 2
    missing = subprocess.run(
        [*command[:2], "DATA=no films"], cwd=tmp_path, capture_output=True, text=True
    )
    assert missing.returncode == 2 and "no films: no dataset there" in missing.stderr
