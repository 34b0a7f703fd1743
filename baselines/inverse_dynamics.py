"""VPT (Baker et al. 2022): guess the actions of videos with an inverse dynamics model.

The model is a fresh stage-1 encoder with a linear head.  From the labeled episodes it learns to
read a_t off (x_t, x_{t+1}); then it guesses the actions of every episode of --data.  Stage 2
predicts those in place of latent actions (paper section 4, baseline VPT).

    python -m baselines.inverse_dynamics --data data/human --labelled_data data/tabletop \\
        --labelled_where combination=seen --preset tiny --out runs/vpt/actions.safetensors
    python pretrain.py --labels idm --labels_file runs/vpt/actions.safetensors --data data/human"""

import math
import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import common
import data
import quantize
import training
from common import option
from model import LAQ, LAQConfig

NEXT = 0.0  # a window of 0 s reaches to the next frame
BATCH = 64  # pairs per step
SHIFT = 0.25  # random shift of both frames: same motion, same action


@dataclass(kw_only=True)
class InverseDynamicsConfig:
    """The options of this command"""

    data: str = option(help="dataset folder whose actions are guessed")
    out: str = option(help="labels file to write (.safetensors)")
    preset: str = option("lapa", "size, as in the other stages: tiny, base or lapa")
    where: str = option("", "guess for episodes with these fields")
    held_out: int = option(50, "episodes held out; 0: none", 0)
    labelled: int = option(100, "labeled episodes to learn from, drawn by --seed")
    labelled_data: str = option("", "where they are; empty: --data")
    labelled_where: str = option("", "and which, e.g. combination=seen")
    steps: int = option(400, f"optimization steps, of {BATCH} pairs each")
    lr: float = option(1e-3, "peak learning rate (AdamW)")
    warmup: int = option(20, "steps of linear warm-up")
    final_lr: float = option(0.05, "cosine down to this fraction of lr")
    image_size: int = option(256, "pixels, as in pretraining, which shares the frame cache")
    for_vqgan: bool = option(False, "resize pictures as for a model that reads codes")
    bins: int = option(256, "as in pretraining")
    binary: str = option("", "as in pretraining: dimensions that mean 0 or 1 (grippers), e.g. 6")
    seed: int = option(0, "of weights, batches and the choice of labeled episodes")


PRESETS = {
    "tiny": dict(image_size=64),
    "base": dict(image_size=128),
    "lapa": dict(for_vqgan=True),
}


class InverseDynamics(nn.Module):
    """Pairs of neighboring frames, float [B, 2, 3, H, W] in [0, 1] -> actions, float [B, A].

    actions: those it learns from, float [M, A]; it predicts them with mean 0 and variance 1"""

    def __init__(self, shape: LAQConfig, actions: np.ndarray) -> None:
        super().__init__()
        self.encoder = LAQ(shape)
        self.head = nn.Linear(shape.code_len * shape.quant_dim, actions.shape[1])
        self.register_buffer("mean", torch.from_numpy(actions.mean(0)))
        self.register_buffer("spread", torch.from_numpy(actions.std(0) + 1e-6))

    def standardized(self, pairs: Tensor) -> Tensor:
        return self.head(self.encoder.difference(pairs).flatten(1))  # B K Q -> B KQ -> B A

    def forward(self, pairs: Tensor) -> Tensor:
        return self.standardized(pairs) * self.spread + self.mean


def encoder_shape(preset: str, image_size: int) -> LAQConfig:
    """Stage 1's network of that preset, with its grid of patches laid over larger pictures"""
    names = {field.name for field in fields(LAQConfig)}
    options = quantize.PRESETS[preset]
    shape = LAQConfig(**{name: value for name, value in options.items() if name in names})
    if image_size < shape.grid or image_size % shape.grid:
        raise ValueError(f"--image_size {image_size}: not a multiple of {shape.grid} patches")
    patch_size = image_size // shape.grid
    return replace(shape, image_size=patch_size * shape.grid, patch_size=patch_size)


def train(
    c: InverseDynamicsConfig, labelled: list[data.Episode], processes: training.Processes
) -> InverseDynamics:
    """Regress the labeled episodes' actions from pairs of neighboring frames"""
    torch.manual_seed(c.seed)
    actions = np.concatenate([episode.actions for episode in labelled])
    model = InverseDynamics(encoder_shape(c.preset, c.image_size), actions).to(processes.device)
    optimizer = training.make_optimizer([{"params": model.parameters(), "lr": c.lr}])
    lengths = [min(len(episode.actions), len(episode.frames) - 1) for episode in labelled]
    for step in tqdm(range(c.steps), desc="inverse dynamics", mininterval=1.0, leave=False):
        training.seed_step(c.seed, step)
        frames = data.draw(c.seed, step, BATCH, lengths)
        pairs = data.to_float(data.frame_pairs(labelled, frames, NEXT), processes.device)
        pairs = data.random_shift(pairs, SHIFT)
        wanted = torch.from_numpy(np.stack([labelled[e].actions[t] for e, t in frames]))
        wanted = (wanted.to(pairs.device) - model.mean) / model.spread
        loss = ((model.standardized(pairs) - wanted) ** 2).mean()
        if not math.isfinite(loss.item()):
            common.fail(f"the loss is {loss.item()}: inverse dynamics, step {step}")
        loss.backward()
        training.set_learning_rate(optimizer, c, step)
        processes.clip_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


@torch.no_grad()
def guess_actions(model: InverseDynamics, episodes: list[data.Episode]) -> list[np.ndarray]:
    """The action between every frame and its successor, per episode float32 [T, A]; nothing
    follows the last frame, which repeats the one before"""
    guesses = []
    for episode in episodes:
        frames = [(0, t) for t in range(len(episode.frames))]
        pairs = data.frame_pairs([episode], frames, NEXT)
        guess = model(data.to_float(pairs, model.mean.device))
        guess[-1] = guess[-2]
        guesses.append(guess.cpu().numpy())
    return guesses


def snap_to_values(
    guesses: list[np.ndarray], labelled: list[data.Episode], bins: int, binary: str
) -> list[np.ndarray]:
    """Guesses of a gripper scatter around its few values: move them onto the nearest true one"""
    actions = np.concatenate([episode.actions for episode in labelled])
    snapped = [guess.copy() for guess in guesses]
    for a, edges in enumerate(data.fit_bins(actions, bins, binary)):
        if len(edges) > data.FEW + 1:
            continue
        for guess in snapped:
            column = data.to_bins(guess[:, a : a + 1], [edges])
            guess[:, a] = data.from_bins(column, [edges])[:, 0]
    return snapped


def held_out_r2(model: InverseDynamics, held_out: list[data.Episode]) -> list[float | None] | None:
    """R2 of the guesses per action dimension, None where no held-out episode has actions"""
    known = [episode for episode in held_out if episode.actions is not None]
    if not known:
        return None
    guesses = guess_actions(model, known)
    guesses = [guess[: len(e.actions)] for guess, e in zip(guesses, known, strict=True)]
    r2 = data.r2(np.concatenate(guesses), np.concatenate([e.actions for e in known]))
    return [value if value is None else round(value, 3) for value in r2]


def refuse_unwritable(out: Path) -> None:
    """Before training: refuse a file that could not be written at the end"""
    with common.refuse(f"--out {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir() or not os.access(out.parent, os.W_OK):
            raise OSError("cannot be written")


def main(c: InverseDynamicsConfig) -> None:
    processes = training.start_processes()
    if processes.world > 1:
        common.fail("baselines.inverse_dynamics runs in one process")
    refuse_unwritable(Path(c.out))
    labelled_folder = c.labelled_data or c.data
    labelled_set = data.open_dataset(
        labelled_folder, c.image_size, c.labelled_where, for_vqgan=c.for_vqgan
    )
    labelled, _ = labelled_set.split(c.held_out)
    labelled = data.labelled_few(labelled, c.labelled, c.seed)
    dataset = data.open_dataset(c.data, c.image_size, c.where, for_vqgan=c.for_vqgan)
    _, held_out = dataset.split(c.held_out)
    with common.refuse("network"):
        model = train(c, labelled, processes)
    r2 = held_out_r2(model, held_out)
    if r2 is not None:
        print("inverse dynamics R2 on held-out episodes:", r2)
    guesses = guess_actions(model, dataset.episodes)
    guesses = snap_to_values(guesses, labelled, c.bins, c.binary)
    names = [episode.id for episode in dataset.episodes]
    meta = {"labels": "idm", "dataset": dataset.fingerprint, "r2": r2, "options": c.__dict__}
    data.save_labels(Path(c.out), dict(zip(names, guesses, strict=True)), meta)
    print("wrote", c.out)


if __name__ == "__main__":
    main(common.parse_options(InverseDynamicsConfig, sys.argv[1:], PRESETS)[0])
