"""Rows of the frame cache and of full stages."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import data
from benchmarks.measure import bandwidth, print_row, seconds

ROOT = Path(__file__).resolve().parent.parent


def loader() -> None:
    """64 pairs of frames from the cache, and from jpegs of 320x180 as a naive loader reads them"""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        write_jpegs_and_dataset(Path(folder), rng)
        os.environ["LAPA_CACHE"] = f"{folder}/cache"
        (episode,) = data.open_dataset(folder, 256).episodes
        pairs = [(0, int(t)) for t in rng.integers(0, 190, 64)]

        def read_jpeg(t: int) -> np.ndarray:
            image = Image.open(f"{folder}/{t}.jpg").convert("RGB")
            return np.asarray(image.resize((256, 256), Image.BILINEAR))

        def read_jpegs() -> np.ndarray:
            return np.stack([(read_jpeg(t), read_jpeg(t + 3)) for _, t in pairs])

        peak = bandwidth()
        print_loader_row("cache", lambda: data.frame_pairs([episode], pairs, 0.6), peak)
        print_loader_row("two jpegs of 320x180 per pair", read_jpegs, peak)


def write_jpegs_and_dataset(folder: Path, rng: np.random.Generator) -> None:
    """200 random pictures, as jpegs and as a dataset of one episode"""
    frames = []
    for i in range(200):
        picture = Image.fromarray(rng.integers(0, 256, (45, 80, 3), np.uint8))
        picture.resize((320, 180), Image.BICUBIC).save(folder / f"{i}.jpg")
        frames.append(np.asarray(Image.open(folder / f"{i}.jpg").resize((256, 256))))
    np.save(folder / "x.npy", np.stack(frames))
    episode = '{"id": "a", "instruction": "push it", "video": "x.npy", "fps": 5}'
    (folder / "episodes.jsonl").write_text(episode)


def print_loader_row(name: str, read: Callable[[], np.ndarray], peak: float) -> None:
    """peak: bytes per second that the machine reads"""
    taken, _ = seconds(read, 3.0)
    print_row(
        f"64 pairs of 256x256 from {name}",
        f"{128 / taken:,.0f} frames/s",
        f"{1000 * taken:,.1f} ms",
        f"{128 * 3 * 256**2 / taken / peak:.1%} of bandwidth",
    )


def stages(steps: int = 30) -> None:
    """The demo's stages as a user starts them: seconds of the process, with start and data"""
    with tempfile.TemporaryDirectory() as home:
        train = f"--preset tiny --steps {steps} --held_out 10 --out {home}"
        videos = f"--data {home}/table"
        commands = {
            "150 episodes recorded": f"-m simulators.tabletop {home}/table --episodes 150",
            f"quantize, {steps} steps of 64 pairs, labels, report card": (
                f"quantize.py {train}/laq {videos}"
            ),
            f"pretrain, {steps} steps of 64 rows": (
                f"pretrain.py {train}/pretrain {videos} --laq {home}/laq"
            ),
            f"finetune, {steps} steps of 64 rows": (
                f"finetune.py {train}/finetune {videos} --init_from {home}/pretrain"
            ),
            "evaluate, 2 x 50 rollouts": (
                f"evaluate.py --policies X={home}/finetune --episodes 50 --film 0 --out {home}/e"
            ),
        }
        for name, command in commands.items():
            began = time.time()
            subprocess.run(
                [sys.executable, *command.split()],
                cwd=ROOT,
                check=True,
                capture_output=True,
                env={**os.environ, "LAPA_CACHE": f"{home}/cache"},
            )
            taken = f"{time.time() - began:.1f} s"
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
            print_row(name, taken=taken, memory=peak)
