"""What the test files share: the repository's path, ways to run a stage, hand-made datasets."""

import json
import os
import runpy
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from small import SEQUENCES  # noqa: E402

from model import VLA, VLAConfig  # noqa: E402 now that the repository is on the path

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


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
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            return stop.code or 0
        return 0

    return run


@pytest.fixture
def make_dataset(tmp_path, monkeypatch):
    """make_dataset({"a": 5}): a dataset of one random video of 5 frames with actions -> its folder.
    change(root, rows) may break things before episodes.jsonl is written.  Its cache is fresh."""
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
    """A VLA of 2 layers that reads 4 patches, the words of small.SEQUENCES, and both kinds of action"""
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
