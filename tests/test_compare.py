"""The comparison of arms (baselines/compare.sh, make table), run with a python that takes notes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(
    not (shutil.which("make") and shutil.which("xargs")), reason="needs make and xargs"
)

NOTES = f"""#!{sys.executable}
import pathlib, sys

words = sys.argv[1:]
with open("said", "a") as file:
    file.write(" ".join(words) + "\\n")
out = pathlib.Path(words[words.index("--out") + 1] if "--out" in words else words[2])
if str(out) == pathlib.Path("broken").read_text():
    sys.exit(3)
files = ["summary.json", "results.json", "episodes.jsonl"]
for path in [out] if out.suffix else [out / name for name in files]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
"""

BASE = ("captions", "base", "quantize", "quantize-human", "pretrain", "finetune", "scratch")
ARMS = ("VPT", "ACTIONVLA", "LAPA_human", "VPT_human")
FOLDERS = {  # what one seed makes
    *BASE,
    *(f"{arm}/{stage}" for arm in ARMS for stage in ("pretrain", "finetune")),
    "VPT/actions.safetensors",
    "VPT_human/actions.safetensors",
    "arms",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Makefile and script, and a python that notes its arguments in the file `said` and makes what
    the real commands leave; it fails at the output that the file `broken` names"""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "baselines", tmp_path / "baselines")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "requirements.txt").touch()
    os.utime(tmp_path / "requirements.txt", (0, 0))
    (tmp_path / ".venv/ready").touch()
    (tmp_path / "broken").touch()
    python = tmp_path / ".venv/bin/python"
    python.write_text(NOTES)
    python.chmod(0o755)
    return tmp_path


def run(checkout: Path, *words: str) -> tuple[int, list[str], str]:
    """-> exit code, the commands that python was given, stderr"""
    (checkout / "said").write_text("")
    done = subprocess.run(words, cwd=checkout, capture_output=True, text=True)
    return done.returncode, (checkout / "said").read_text().splitlines(), done.stderr


def by_folder(said: list[str], out: str) -> dict[str, str]:
    """Folder below `out` -> the one command that makes it"""
    found = re.findall(rf"(.*--out {re.escape(out)}/(\S+).*)", "\n".join(said))
    assert len(found) == len({folder for _, folder in found})
    return {folder: line for line, folder in found}


def test_every_stage_of_every_seed_is_run_once(checkout: Path) -> None:
    code, said, stderr = run(checkout, "make", "table", "ARGS=--steps 1")
    assert code == 0, stderr
    for seed, out in enumerate(("runs/demo", "runs/table/seed1", "runs/table/seed2")):
        lines = by_folder(said, out)
        assert lines.keys() == FOLDERS
        assert all(f"--seed {seed}" in line for line in lines.values())
    assert said[-1].startswith(
        "evaluate.py table --out runs/table/table.md --results runs/demo/arms/"
    )
    assert not any(line.endswith("--steps 1") for line in said)
    code, said, stderr = run(checkout, "make", "table")
    assert code == 0 and [line[:18] for line in said] == ["evaluate.py table "], stderr


def test_arms_differ_in_videos_and_labels_only(checkout: Path) -> None:
    code, said, stderr = run(checkout, "baselines/compare.sh", "runs/my run", "7")
    assert code == 0, stderr
    lines = by_folder(said, "runs/my run")
    differing = {}
    for arm in ("LAPA", *ARMS):
        folder = "pretrain" if arm == "LAPA" else f"{arm}/pretrain"
        command = re.sub(r" --out .*", "", lines[folder]).replace("runs/my run/", "")
        options = dict(re.findall(r"--(\w+) (\S+)", command))
        assert options.pop("init_from") == "base"
        differing[arm] = " ".join(options[name] for name in sorted(options))
        tuned = lines[folder.replace("pretrain", "finetune")]
        assert "--data data/tabletop --where combination=seen" in tuned
        assert f"--init_from runs/my run/{folder} " in tuned
    assert differing == {
        "LAPA": "data/tabletop latent quantize",
        "LAPA_human": "data/human latent quantize-human",
        "VPT": "data/tabletop idm VPT/actions.safetensors",
        "VPT_human": "data/human idm VPT_human/actions.safetensors",
        "ACTIONVLA": "data/tabletop action",
    }
    for arm, videos in (("VPT", "tabletop"), ("VPT_human", "human")):
        guesses = lines[f"{arm}/actions.safetensors"]
        assert f"--data data/{videos} --labelled_data data/tabletop" in guesses
    policies = re.findall(r"(\w+)=(?:runs/my run/)?([\w/]+)", lines["arms"])
    finetuned = [(arm, f"{arm}/finetune") for arm in ARMS]
    ends = [("RANDOM", "random"), ("SCRATCH", "scratch"), ("LAPA", "finetune")]
    assert policies == ends + finetuned and "--seed 7000" in lines["arms"]


def test_a_stage_that_fails_stops_its_arm_and_is_continued(checkout: Path) -> None:
    (checkout / "broken").write_text("x/VPT/pretrain")
    code, said, _ = run(checkout, "baselines/compare.sh", "x", "0")
    assert code not in (0, 2)
    lines = by_folder(said, "x")
    assert lines.keys() == FOLDERS - {"VPT/finetune", "arms"}
    (checkout / "broken").write_text("")
    code, said, stderr = run(checkout, "baselines/compare.sh", "x", "0")
    assert code == 0, stderr
    lines = by_folder(said, "x")
    assert lines.keys() == {"VPT/pretrain", "VPT/finetune", "arms"}
    assert "--resume true" in lines["VPT/pretrain"]


@pytest.mark.parametrize("words", [(), ("x",), ("x", "0", "NOARM"), ("x", "0", "VPT", "y")])
def test_unknown_arms_and_missing_words_are_one_line(checkout: Path, words: tuple[str]) -> None:
    code, said, stderr = run(checkout, "baselines/compare.sh", *words)
    assert code == 2 and not said and stderr.startswith("error: ") and stderr.count("\n") == 1


def test_ci_refuses_arguments_that_it_does_not_know() -> None:
    done = subprocess.run([ROOT / ".ci/run", "--fast"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: --fast: .ci/run takes no arguments\n"
