"""Every command line once, end to end with two steps of training; what they refuse; other
alphabets, blanks in names, numbers that JSON does not have."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from runs import COMMANDS, FINETUNE, PRETRAIN, SHORT, fill_in, read_jsonl
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import data
import evaluate
import finetune
import pretrain
import quantize
import sequences
from baselines import inverse_dynamics


# ---------------------------------------------------------------- every command, once
@pytest.mark.parametrize("name", COMMANDS)
def test_command_succeeds_and_writes_what_it_says(runs, all_runs, name):
    done = all_runs[1][name]
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
    assert {"check": "no defects"}.get(name, "wrote") in done.stdout
    for line in done.stdout.splitlines():
        if line.startswith("wrote "):
            for path in line.partition(":")[0].removeprefix("wrote ").split(", "):
                assert Path(path).exists(), path


def is_finite(value):
    """Every number in nested lists and dictionaries is finite"""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list):
        return all(map(is_finite, value))
    return not isinstance(value, float) or np.isfinite(value)


REPORT = {
    *("pairs", "codes_used", "perplexity"),
    *("psnr_above_copy", "psnr_lost_by_shuffling", "probe_r2"),
}


@pytest.mark.parametrize(
    "path, keys",
    [
        ("laq/report", REPORT),
        ("report/report", {"pairs", "psnr", "probe_r2_shuffled"}),
        ("laq/summary", {"seconds"}),
        ("base/summary", {"loss", "val_loss"}),
        ("latent/summary", {"loss", "val_loss", "accuracy"}),
        ("action/summary", {"loss"}),
        ("idm/summary", {"loss"}),
        ("LAPA/summary", {"loss", "accuracy"}),
        ("SCRATCH/summary", {"loss"}),
        ("evaluate/results", {"arms", "options"}),
    ],
    ids=str,
)
def test_figures_are_there_and_finite(runs, path, keys):
    found = json.loads((runs / f"{path}.json").read_text())
    assert keys <= found.keys() and is_finite(found)


def test_pictures_film_and_labels(runs):
    for path in ("laq/atlas.png", "laq/reconstructions.png", "report/atlas.png"):
        with Image.open(runs / path) as picture:
            assert picture.width > 200 and picture.convert("L").getextrema()[0] < 128
    with Image.open(runs / "evaluate/rollouts.gif") as film:
        assert film.n_frames == 5 + 1  # max_steps, and the start
    episodes = read_jsonl(runs / "table/episodes.jsonl")
    by_run, by_command = (load_file(runs / f"{p}.safetensors") for p in ("laq/labels", "labels"))
    assert {n: len(z) for n, z in by_run.items()} == {e["id"]: e["frames"] for e in episodes}
    assert all(z.shape[1] == 4 and int(z.long().max()) < 8 for z in by_run.values())
    assert all(torch.equal(z, by_command[n]) for n, z in by_run.items())


@pytest.mark.parametrize(
    "command, config, presets",
    [
        ("quantize.py", quantize.QuantizeConfig, quantize.PRESETS),
        ("quantize.py label", quantize.ApplyConfig, {}),
        ("pretrain.py", pretrain.PretrainConfig, pretrain.PRESETS),
        ("finetune.py", finetune.FinetuneConfig, finetune.PRESETS),
        ("evaluate.py", evaluate.EvaluateConfig, {}),
        (
            "-m baselines.inverse_dynamics",
            inverse_dynamics.InverseDynamicsConfig,
            inverse_dynamics.PRESETS,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_help_of_the_commands(inside, capsys, command, config, presets):
    assert inside(*command.split(), "--help") == 0
    said = capsys.readouterr().out
    names = {field.name for field in fields(config)}
    for field in fields(config):
        help = field.metadata["help"]
        assert help and f"  --{field.name} " in said and help in " ".join(said.split()), field.name
    for preset, values in presets.items():
        assert f"preset {preset}:" in said and values.keys() <= names


# ---------------------------------------------------------------- refusals
@pytest.fixture(scope="session")
def broken(runs, tmp_path_factory):
    """Variants of the runs' output that a stage must not accept"""
    bad = tmp_path_factory.mktemp("broken") / "all"
    shutil.copytree(runs, bad)
    path = common.latest(bad / "laq") / "model.safetensors"
    save_file({name: w + 1e-3 for name, w in load_file(path).items()}, path)  # the labels stay
    path = common.latest(bad / "LAPA") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    for path in (bad / "table/actions").iterdir():
        np.save(path, np.load(path)[:, [0, 1, 0]])
    labels = load_file(bad / "laq/labels.safetensors")
    with safe_open(bad / "laq/labels.safetensors", "numpy") as file:
        meta = json.loads(file.metadata()["meta"])
    arrays = {name: codes.numpy() for name, codes in labels.items()}
    data.save_labels(bad / "laq/labels.safetensors", arrays, {**meta, "dataset": "0" * 12})
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
def test_bad_input_is_refused_in_one_line(runs, broken, call, capsys, tmp_path, line, words):
    words = fill_in(words, {"DIR": runs, "BAD": broken})
    assert call(line, BAD=broken) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and words in said and len(said) < 2000
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_errors_end_a_process_with_code_2_and_one_line(start, tmp_path):
    done = start("quantize.py", "--data", tmp_path / "none", "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- unusual data and names
def test_a_dimension_that_never_moves_leaves_valid_json(runs, call, tmp_path, capsys, recwarn):
    still = shutil.copytree(runs / "table", tmp_path / "still")
    for path in (still / "actions").iterdir():
        np.save(path, np.load(path) * np.float32([0, 1]))
    assert call(f"quantize.py {SHORT} --held_out 2 --data STILL --out OUT/q", STILL=still) == 0
    guesses = tmp_path / "guesses.safetensors"
    line = "-m baselines.inverse_dynamics --preset tiny --labelled 6 --steps 2 --held_out 2"
    assert call(f"{line} --data STILL --out", guesses, STILL=still) == 0
    assert "held-out episodes: [None, " in capsys.readouterr().out
    line = f"pretrain.py {SHORT} --labels idm --held_out 2 --data STILL --init_from DIR/base"
    assert call(f"{line} --out OUT/p", "--labels_file", guesses, STILL=still) == 0
    assert "1 (always 0)" in capsys.readouterr().out

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    for path in tmp_path.rglob("*.json*"):
        text = path.read_text()
        for document in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(document, parse_constant=refuse)
    card = json.loads((tmp_path / "out/q/report.json").read_text())
    assert card["probe_r2"][0] is None and isinstance(card["probe_r2"][1], float)
    assert "| probe r2 | never moves, " in (tmp_path / "out/q/report.md").read_text()
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_other_alphabets_under_an_old_locale(runs, tmp_path):
    """Checkpoints, labels and output, in a process whose own encoding is ASCII"""
    words = shutil.copytree(runs / "table", tmp_path / "öffne")
    rows = [row | {"instruction": "öffne 打开抽屉"} for row in read_jsonl(words / "episodes.jsonl")]
    for i, row in enumerate(rows):
        (words / row["video"]).rename(words / f"videos/bär{i}.npy")
        row["video"] = f"videos/bär{i}.npy"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (words / "episodes.jsonl").write_text(lines, encoding="utf-8")
    (words / "tokenizer.json").unlink()
    old_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = os.environ | old_locale | {"LAPA_CACHE": str(tmp_path / "cache")}

    def run(line, *more):
        command = [sys.executable, *line.split(), "--data", words, *more]
        encoded = [str(word).encode() for word in command]
        done = subprocess.run(encoded, cwd=ROOT, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr

    run(f"pretrain.py {SHORT} --held_out 2 --labels action", "--out", tmp_path / "p")
    finetune_line = FINETUNE.partition(" --data")[0]
    run(finetune_line, "--init_from", tmp_path / "p", "--out", tmp_path / "f")
    tokenizer = sequences.read_tokenizer(tmp_path / "f")
    known = tokenizer.encode("öffne 打开抽屉", add_special_tokens=False)
    assert known.tokens == ["öffne", "打开抽屉"]


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
    python = tmp_path / ".venv/bin/python"  # notes its words, one per line, and makes its output
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
