"""Evaluation with any simulator: opened by name, counted, refused in one line."""

import errno
import importlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import evaluate
import simulators
from evaluate import Rollout
from simulators import open_simulator


@pytest.fixture
def refused(capsys):
    """refused(call, "word"): the call ends with code 2 and one line that holds the words"""

    def check(call, *words):
        capsys.readouterr()
        try:
            code = call()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr().err
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
        assert all(word in said for word in words), said

    return check


@pytest.fixture
def add_simulator(tmp_path, monkeypatch):
    """add_simulator("toy", code): one more file in the folder of simulators, for this test"""
    folder = tmp_path / "more_simulators"
    folder.mkdir()
    monkeypatch.setattr(simulators, "__path__", [*simulators.__path__, str(folder)])
    added = []

    def add(name, code):
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
        importlib.invalidate_caches()
        added.append(name)

    yield add
    for name in added:
        sys.modules.pop(f"simulators.{name}", None)


def toy_code():
    """The simulator that docs/simulators.md shows"""
    page = (ROOT / "docs/simulators.md").read_text(encoding="utf-8")
    return page.partition("```python\n")[2].partition("```")[0]


def run_toy(inside, out, *more):
    words = ["--env", "toy", "--episodes", 12, "--batch", 8, "--out", out, *more]
    return inside("evaluate.py", *words)


# ---------------------------------------------------------------- opening by name
def test_the_table_top_opens_by_name_with_its_own_defaults():
    env = open_simulator("tabletop", 3, "unseen", options="look=real,embodiment=human")
    assert (env.batch, env.look, env.embodiment, env.max_steps) == (3, "real", "human", 50)
    obs, info = env.reset((1000, 0))
    assert obs["image"].shape[0] == len(obs["instruction"]) == len(info["family"]) == 3
    assert open_simulator("tabletop", 1, "all", 7).max_steps == 7


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("nothing", 1, "seen"), "--env 'nothing': no such simulator, expected one of tabletop"),
        (("../common", 1, "seen"), "--env '../common': no such simulator"),
        (("", 1, "seen"), "--env '': no such simulator"),
        (("tabletop.more", 1, "seen"), "--env 'tabletop.more': no such simulator"),
        (("tabletop", 1, "hidden"), "--env tabletop: split is one of all, seen, unseen"),
        (("tabletop", 1, "seen", 0, "look=grey"), "look is one of plain, real, not 'grey'"),
        (
            ("tabletop", 1, "seen", 0, "color=red"),
            "--env_options color: no such option, expected one of embodiment, look",
        ),
        (("tabletop", 1, "seen", 0, "look"), "--env_options 'look': expected name=value"),
        (("tabletop", 1, "seen", 0, "look=real,look=plain"), "each name once"),
        (("tabletop", 1, "seen", 0, "look=real,"), "expected name=value"),
    ],
)
def test_what_cannot_be_opened_is_one_line(refused, arguments, words):
    refused(lambda: open_simulator(*arguments), words)


@pytest.mark.parametrize(
    "code, words",
    [
        ("import no_such_package", "--env toy: No module named 'no_such_package'"),
        ("raise ImportError('pip install it')", "--env toy: pip install it"),
        ("TOY = 1", "--env toy: simulators.toy defines no SIMULATOR"),
    ],
)
def test_a_simulator_that_cannot_be_imported_is_one_line(refused, add_simulator, code, words):
    add_simulator("toy", code)
    refused(lambda: open_simulator("toy", 1, "near"), words)


def test_options_have_the_types_that_the_simulator_says(refused, add_simulator):
    code = toy_code().replace("OPTIONS = {}", 'OPTIONS = {"size": int}')
    add_simulator(
        "toy", code.replace("max_steps):", "max_steps, size=32):\n        self.size = size")
    )
    assert open_simulator("toy", 1, "far", options="size=8").size == 8
    refused(lambda: open_simulator("toy", 1, "far", options="size=big"), "--env_options size=big")
    add_simulator("other", toy_code())
    refused(lambda: open_simulator("other", 1, "far", options="size=8"), "this simulator has none")


# ---------------------------------------------------------------- policies on the table top
def test_evaluation_counts_every_policy_and_split(runs):
    arms = json.loads((runs / "evaluate/results.json").read_text())["arms"]
    assert list(arms) == ["LAPA", "SCRATCH", "RANDOM", "EXPERT"]
    for row in (arm[split] for arm in arms.values() for split in ("seen", "unseen")):
        p = row["success"] / 100
        assert row["n"] == 5 == sum(family["n"] for family in row["families"].values())
        assert row["se"] == pytest.approx(100 * (p * (1 - p) / 5) ** 0.5, abs=0.01)


def test_the_expert_always_succeeds(inside, tmp_path):
    words = ("--policies", "E=expert", "--episodes", 40, "--film", 0, "--out", tmp_path)
    assert inside("evaluate.py", *words) == 0
    arm = json.loads((tmp_path / "results.json").read_text())["arms"]["E"]
    assert arm["seen"]["success"] == arm["unseen"]["success"] == 100


def test_a_policy_may_lie_in_a_folder_with_a_comma(runs, call, tmp_path):
    shutil.copytree(runs / "LAPA", tmp_path / "a,b")
    line = "evaluate.py --episodes 2 --max_steps 1 --film 0 --out OUT --policies"
    assert call(line, f"A={tmp_path}/a,b,B=random") == 0
    arms = json.loads((tmp_path / "out/results.json").read_text())["arms"]
    assert list(arms) == ["A", "B"]


# ---------------------------------------------------------------- a simulator in one file
def test_a_simulator_is_added_as_one_file(inside, add_simulator, tmp_path):
    """The one of docs/simulators.md, whose actions, families and splits are not the table top's"""
    add_simulator("toy", toy_code())
    out = tmp_path / "e"
    assert run_toy(inside, out, "--policies", "R=random,E=expert", "--film", 2) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["options"]["splits"] == "near,far" and results["options"]["max_steps"] == 20
    for arm in results["arms"].values():
        assert list(arm) == ["near", "far"]
        for row in arm.values():
            assert row["n"] == 12 and list(row["families"]) == ["left", "right"]
    assert results["arms"]["E"]["far"]["success"] == 100 > results["arms"]["R"]["far"]["success"]
    table = (out / "results.md").read_text(encoding="utf-8")
    assert "| **near** | left | right | **far** | left | right |" in table
    with Image.open(out / "rollouts.gif") as film:
        assert 5 < film.n_frames <= 21 + 5  # equal pages are one
    again = tmp_path / "table.md"
    assert inside("evaluate.py", "table", "--results", out / "results.json", "--out", again) == 0
    assert again.read_text(encoding="utf-8") == table  # without opening a simulator
    more = ("--policies", "R=random", "--splits", "far", "--max_steps", 3, "--film", 0)
    assert run_toy(inside, tmp_path / "short", *more) == 0
    arm = json.loads((tmp_path / "short/results.json").read_text())["arms"]["R"]
    assert list(arm) == ["far"] and arm["far"]["success"] == 0  # three steps do not get there


def test_a_policy_of_another_action_width_is_refused(
    inside, refused, add_simulator, make_dataset, tmp_path
):
    add_simulator("toy", toy_code())
    dataset = make_dataset({"a": 4, "b": 4})
    shared = ("--preset", "tiny", "--steps", 1, "--batch", 2, "--held_out", 0, "--data", dataset)
    words = ("--labels", "action", "--out", tmp_path / "p")
    assert inside("pretrain.py", *shared, *words) == 0
    words = ("--init_from", tmp_path / "p", "--labelled", 2, "--out", tmp_path / "f")
    assert inside("finetune.py", *shared, *words) == 0
    policies = ("--policies", f"A={tmp_path / 'f'}")
    said = "predicts 2 action dimensions, --env toy takes 1"
    refused(lambda: run_toy(inside, tmp_path / "e", *policies), f"--policies {tmp_path}", said)
    assert not (tmp_path / "e").exists()


def test_an_expert_that_does_not_exist_is_refused(inside, refused, add_simulator, tmp_path):
    add_simulator("toy", toy_code().replace("def expert", "def other"))
    policies = ("--policies", "R=random,E=expert")
    refused(lambda: run_toy(inside, tmp_path / "e", *policies), "E=expert: --env toy has no expert")
    refused(lambda: run_toy(inside, tmp_path / "e", *policies, "--splits", "other"), "'other'")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("left", ["nothing", "empty folder"])
def test_without_the_folder_of_simulators_only_evaluation_fails(tmp_path, left):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "model", tmp_path / "model")
    if left == "empty folder":
        (tmp_path / "simulators/__pycache__").mkdir(parents=True)

    def start(*words):
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = start("evaluate.py", "--policies", "R=random", "--out", "e")
    assert done.returncode == 2 and not (tmp_path / "e").exists()
    assert done.stderr.startswith("error: --env: ") and done.stderr.count("\n") == 1
    arms = {"R": {"seen": {"success": 50.0, "n": 2, "se": 35.36, "families": {}}}}
    (tmp_path / "r.json").write_text(json.dumps({"arms": arms}))
    done = start("evaluate.py", "table", "--results", "r.json", "--out", "t.md")
    assert done.returncode == 0 and "| R | 50.0 ± 35.4 |" in done.stdout, done.stderr


# ---------------------------------------------------------------- tables, films, words
def test_table_of_seeds_by_hand(inside, tmp_path):
    for seed, won in enumerate((50.0, 60.0, 70.0)):
        arms = {"LAPA_human": {"seen": {"success": won, "n": 200, "se": 3.5}}}
        (tmp_path / f"{seed}.json").write_text(json.dumps({"arms": arms}))
    files = ",".join(str(tmp_path / f"{seed}.json") for seed in range(3))
    assert inside("evaluate.py", "table", "--results", files, "--out", tmp_path / "t.md") == 0
    said = (tmp_path / "t.md").read_text()
    assert "| LAPA human | 60.0 ± 5.8 |" in said and "% of 200, mean of 3 seeds" in said


def test_the_families_of_one_seed_come_from_its_results(inside, tmp_path):
    """In the order in which they appear, also those that the first split does not have"""
    row = {"success": 50.0, "n": 4, "se": 25.0}
    seen = row | {"families": {"reach": row, "push": row}}
    arms = {"A": {"seen": seen, "unseen": row | {"families": {"push": row, "fly": row}}}}
    (tmp_path / "r.json").write_text(json.dumps({"arms": arms}))
    words = ("--results", tmp_path / "r.json", "--out", tmp_path / "t.md")
    assert inside("evaluate.py", "table", *words) == 0
    head, _, line = (tmp_path / "t.md").read_text(encoding="utf-8").splitlines()
    names = ("reach", "push", "fly")
    columns = [name.strip() for name in head.split("|")[2:-1]]
    assert columns == ["**seen**", *names, "**unseen**", *names]
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert [cell == "-" for cell in cells] == [name in (3, 5) for name in range(8)]


def test_a_film_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    def full(self, *args, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    rollout = Rollout(np.zeros((1, 2, 8, 8, 3), np.uint8), ["x"], np.array([True]), ["push"])
    with pytest.raises(SystemExit) as stop:
        evaluate.draw_film({"a": rollout}, tmp_path / "x.gif")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.endswith("x.gif: not written: No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_words_that_a_terminal_cannot_show_do_not_end_a_run(start, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    words = ("--policies", "RANDOM=random", "--episodes", 2, "--film", 0, "--out", tmp_path / "e")
    done = start("evaluate.py", *words)
    assert done.returncode == 0 and "\\xb1" in done.stdout
    assert "±" in (tmp_path / "e/results.md").read_text(encoding="utf-8")
