"""What the test files share: the repository's path, ways to run a stage, the runs of all stages,
hand-made datasets."""

import json
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runs import WAVES, fill_in  # noqa: E402 (these import the repository, on the path only now)
from small import SEQUENCES  # noqa: E402 (as above)

from model import VLA, VLAConfig  # noqa: E402 (as above)

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
TAKES_LONG = {"runs", "trained"}  # fixtures: a minute, half a minute


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """Whatever waits for the runs of all stages is slow"""
    for item in items:
        if TAKES_LONG & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


def make_film(path, frames, rate=5, codec="libx264", pixels="yuv420p", times=None):
    """Write frames, uint8 [H, W, 3] each, as a film; times: when each is shown, in milliseconds"""
    with av.open(f"file:{path}", "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if times is not None:
                picture.pts, picture.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """start("data.py", "check", D): that command line, in a process and a folder of its own"""
    home = tmp_path_factory.mktemp("home")
    os.environ["LAPA_CACHE"] = str(home / "cache")

    def run(*words):
        words = [str(ROOT / str(w) if str(w).endswith(".py") else w) for w in words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=home,
            capture_output=True,
            text=True,
            env=environment,
        )

    return run


@pytest.fixture
def inside(monkeypatch):
    """inside("data.py", "check", D) -> exit code: the same within this process, which is quicker"""

    def run(script, *words):
        module, words = (words[0], words[1:]) if script == "-m" else (None, words)
        monkeypatch.setattr(sys, "argv", [module or script, *map(str, words)])
        try:
            if module:
                monkeypatch.delitem(sys.modules, module, raising=False)  # as in a fresh process
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            return stop.code or 0
        return 0

    return run


@pytest.fixture(scope="session")
def all_runs(tmp_path_factory, start):
    """-> the folder of all runs, and {name: finished process}"""
    folder = tmp_path_factory.mktemp("runs")
    finished = {}

    def work(line):
        return start(*fill_in(line, {"DIR": folder}).split())

    with ThreadPoolExecutor(2) as pool:
        for wave in WAVES:
            finished.update(zip(wave, pool.map(work, wave.values()), strict=True))
    return folder, finished


@pytest.fixture(scope="session")
def runs(all_runs):
    """The folder of what all commands of runs.py have written: to be read and copied"""
    return all_runs[0]


@pytest.fixture
def call(inside, runs, tmp_path):
    """call("quantize.py --data DIR/table --out OUT", "--seed", 1) -> exit code of that command
    line, within this process.  DIR: the folder of all runs; OUT: a new one"""

    def run(line, *more, **folders):
        line = fill_in(line, {"DIR": runs, "OUT": tmp_path / "out"} | folders)
        return inside(*line.split(), *more)

    return run


@pytest.fixture
def make_dataset(tmp_path, monkeypatch):
    """make_dataset({"a": 5}): a dataset of one random video of 5 frames with actions -> its folder.
    change(root, rows) may break things before episodes.jsonl is written.  The cache is fresh."""
    monkeypatch.setenv("LAPA_CACHE", str(tmp_path / "cache"))

    def make(lengths, change=lambda root, rows: None, size=8, root=tmp_path / "dataset"):
        rng, rows = np.random.default_rng(0), {}
        (root / "videos").mkdir(parents=True)
        for name, T in lengths.items():
            np.save(root / f"{name}.npy", rng.random((T - 1, 2), dtype=np.float32))
            np.save(root / f"videos/{name}.npy", rng.integers(0, 256, (T, size, size, 3), np.uint8))
            rows[name] = {
                "id": name,
                "instruction": "push it",
                "video": f"videos/{name}.npy",
                "fps": 5,
                "frames": T,
                "actions": f"{name}.npy",
            }
        change(root, rows)
        lines = [r if isinstance(r, str) else json.dumps(r) for r in rows.values()]
        (root / "episodes.jsonl").write_text("\n".join(lines))
        return root

    return make


@pytest.fixture
def vla():
    """A VLA of 2 layers that reads 4 patches, the words of small.SEQUENCES, and both kinds of
    action"""
    torch.manual_seed(0)
    net = VLA(
        VLAConfig(
            dim=32,
            layers=2,
            heads=2,
            mlp=48,
            latent_vocab=8,
            action_vocab=16,
            text_vocab=SEQUENCES.tokenizer.get_vocab_size(),
            rope_theta=1e4,
            vision_vocab=0,
            image_size=16,
            patch_size=8,
        )
    )
    for p in net.parameters():
        p.data.mul_(8 if p.std() < 0.1 else 1)  # fresh weights are so small that all looks alike
    return net.eval()
