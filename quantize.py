"""Stage 1, latent action quantization (paper 3.1): name what changed between two frames.

An encoder looks at a frame and one 0.6 s later and writes down 4 codes, each from 0 to 7; a decoder
must draw the later frame from the first and the codes.  No action labels are used.  Afterward
every frame of the dataset is labeled with its latent action, and a report card is written.

    python quantize.py --data data/tabletop --out runs/demo/quantize --preset tiny     # laptop
    python quantize.py --data D --out O --preset lapa                                  # one GPU
    torchrun --nproc_per_node 8 quantize.py --data D --out O --preset lapa             # eight GPUs
    python quantize.py label --laq O --data OTHER --out other.safetensors    # label more videos
    python quantize.py report --laq O --data OTHER --out reports/other     # report card on them"""

import importlib.util
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

import common
import data
import training
from common import option
from model import LAQ, LAQConfig, load_strictly


@dataclass(kw_only=True)
class QuantizeConfig(LAQConfig, training.TrainConfig):
    """The options of this stage, on top of the network's shape"""

    window: float = option(0.6, "seconds from x_t to x_{t+H} (paper: 0.6; Something-Something 2.5)")
    shift: float = option(
        0.0, "shared random shift of what the encoder sees, as a fraction of the image"
    )
    shift_from: int = option(0, "step at which the shift starts to grow from 0")
    shift_until: int = option(0, "step from which it is full")
    steps: int = option(100_000, "optimization steps")
    batch: int = option(64, "pairs per step, over all processes")
    lr: float = option(1e-4, "Adam, betas 0.9/0.99, no weight decay (code)")
    codebook_lr: float = option(1.0, "codebook rate relative to lr")
    codebook_pull: float = option(
        0.0, "fraction of the way a used entry moves to the mean of its outputs per step"
    )
    clip: float = option(0.5, "largest gradient norm")
    replace_below: float = option(
        0.1, "an entry used less than this fraction of a fair share is dead"
    )


PRESETS = {
    "tiny": dict(
        image_size=32,
        patch_size=4,
        dim=96,
        spatial_depth=1,
        temporal_depth=1,
        decoder_depth=1,
        heads=4,
        dim_head=24,
        quant_dim=8,
        codebook_init=0.1,
        residual=True,
        shift=0.25,
        shift_from=100,
        shift_until=300,
        steps=450,
        lr=2e-3,
        codebook_lr=0.1,
        codebook_pull=0.5,
        warmup=50,
        final_lr=0.1,
        save_every=150,
    ),
    "base": dict(
        image_size=128,
        patch_size=16,
        dim=384,
        spatial_depth=4,
        temporal_depth=4,
        decoder_depth=4,
        heads=6,
        quant_dim=16,
        codebook_init=0.1,
        residual=True,
        shift=0.25,
        shift_from=500,
        shift_until=2000,
        steps=30_000,
        lr=5e-4,
        codebook_lr=0.1,
        codebook_pull=0.5,
        warmup=500,
        final_lr=0.1,
        bf16=True,
    ),
    "lapa": dict(bf16=True),
}


# ------------------------------------------------------------------------ training
def train(c: QuantizeConfig) -> None:
    """Learn the codes, label the dataset with them, write the report card"""
    processes = training.start_processes(c)
    model = build_model(c)
    local_rows = processes.local_rows
    dataset = data.open_dataset(c.data, c.image_size, c.where)
    train_set, held_out = dataset.split(c.held_out)
    frame_counts = [len(episode.frames) for episode in train_set]
    sampler = data.FrameSampler(train_set, frame_counts, c.seed, c.batch, local_rows)

    def load_pairs(step: int) -> Tensor:
        pairs = data.frame_pairs(train_set, sampler.frames(step), c.window)
        return data.to_float(pairs, processes.device)  # B 2 3 H W

    identity = {"dataset": dataset.fingerprint}
    run = training.Run(c, processes, "quantize", model.config, identity, {"window": c.window})
    training.place(model, c, processes, model.all_layers, unsharded=[model.quantizer.codebook])
    optimizer = make_optimizer(model, c.lr, c.codebook_lr)
    run.resume(model, optimizer)
    processes.say(
        f"LAQ: {sum(p.numel() for p in model.parameters()):,} parameters, {len(train_set)} "
        f"training episodes, {len(held_out)} held out, {processes.device}"
    )

    batches = data.stream(load_pairs, run.start, c.steps)
    for step, pairs in run.steps(batches, "pairs"):
        training.set_learning_rate(optimizer, c, step)
        shift = shift_at(step, c.shift, c.shift_from, c.shift_until)
        shifted = data.random_shift(pairs, shift, c.batch, local_rows) if shift else None
        # NSVQ's noise, for the global batch, so the same for any number of processes (run.steps
        # has seeded torch)
        noise = torch.randn(c.batch, c.code_len, c.quant_dim)[local_rows].to(pairs.device)
        batch = {"pair": pairs, "shifted": shifted, "noise": noise}
        results = []
        for part in processes.micro_batches(model, batch):  # --accumulate
            with processes.autocast():  # --bf16
                loss, d, indices = model(**part)
            run.refuse_not_finite("loss", loss, step, sampler)
            (loss / c.accumulate).backward()
            results.append((loss.detach(), d.detach(), indices))
        grad_norm = processes.clip_gradients(optimizer)  # --clip
        run.refuse_not_finite("gradient norm", grad_norm, step, sampler)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses, d, indices = zip(*results, strict=True)
        codes_used = update_codebook(model, torch.cat(d), torch.cat(indices), c, step, processes)
        if run.log_due(step):
            loss = torch.stack(losses).mean()
            run.log(step, {"loss": loss, "codes": codes_used, "grad_norm": grad_norm})
        if run.stop_requested() or run.save_due(step):
            run.save(step, model, optimizer)
    summary, files = label_and_report(c, run, dataset) if processes.main else ({}, [])
    run.finish(summary, files)


def build_model(c: QuantizeConfig) -> LAQ:
    """A fresh LAQ of the shape that the options give"""
    shape = LAQConfig(**{field.name: getattr(c, field.name) for field in fields(LAQConfig)})
    torch.manual_seed(c.seed)
    with common.refuse("network"):
        return LAQ(shape)


def make_optimizer(model: LAQ, lr: float, codebook_lr: float) -> Optimizer:
    """Adam; the codebook learns at codebook_lr x lr"""
    codebook = model.quantizer.codebook
    others = [parameter for parameter in model.parameters() if parameter is not codebook]
    groups = [{"params": others, "lr": lr}, {"params": [codebook], "lr": lr * codebook_lr}]
    return training.make_optimizer(groups, torch.optim.Adam, betas=(0.9, 0.99))


def update_codebook(
    model: LAQ,
    d: Tensor,
    indices: Tensor,
    c: QuantizeConfig,
    step: int,
    processes: training.Processes,
) -> int:
    """After the optimizer's step: the codebook follows the encoder outputs d [B, K, Q] and indices
    [B, K] of all processes, and dead codes come back -> how many codes the batch used"""
    d = processes.gather(d)
    indices = processes.gather(indices)
    model.quantizer.count_uses(indices)
    model.quantizer.pull_to_means(d, indices, c.codebook_pull)
    if replacement_due(step + 1, c.official_counting):
        model.quantizer.replace_dead_codes(d, c.replace_below)
    return len(indices.unique())


def replacement_due(step: int, official: bool = False) -> bool:
    """Whether dead codes are replaced after this many steps: every 10 steps before step 100, then
    every 50.  Officially every 10, 100, then 500 steps, and never from step 5000 on."""
    if official:
        every = 10 if step < 100 else 100 if step < 1000 else 500
        return 0 < step < 5000 and step % every == 0
    return step > 0 and step % (10 if step < 100 else 50) == 0


def shift_at(step: int, largest: float, first: int, whole: int) -> float:
    """The shared random shift at a step.  Codes must first become useful to the decoder: it grows
    from step `first` and is full at step `whole`."""
    growth = (step - first + 1) / max(1, whole - first)
    return largest * min(1.0, max(0.0, growth))


# ------------------------------------------------------------------------ labels, report card
def label(
    model: LAQ, episodes: list[data.Episode], window: float, batch: int = 256
) -> dict[str, np.ndarray]:
    """The latent action of every frame of every episode -> {id: int64 [T, K]}"""
    device = next(model.parameters()).device
    frames = [(e, t) for e, episode in enumerate(episodes) for t in range(len(episode.frames))]
    codes = []
    for at in tqdm(range(0, len(frames), batch), desc="labels", leave=False, mininterval=1.0):
        pairs = data.frame_pairs(episodes, frames[at : at + batch], window)
        codes.append(model.label(data.to_float(pairs, device)).cpu().numpy())
    ends = np.cumsum([len(episode.frames) for episode in episodes])[:-1]
    per_episode = np.split(np.concatenate(codes), ends)
    return {episode.id: rows for episode, rows in zip(episodes, per_episode, strict=True)}


def write_labels(
    model: LAQ, checkpoint: Path, dataset: data.Dataset, window: float, path: Path
) -> Path:
    """Write the labels file of a dataset, which records the LAQ and the dataset -> its path"""
    meta = {
        "laq": common.fingerprint(checkpoint),
        "window": window,
        "dataset": dataset.fingerprint,
        "codebook_size": model.config.codebook_size,
        "code_len": model.config.code_len,
    }
    data.save_labels(path, label(model, dataset.episodes, window), meta)
    return path


def label_and_report(
    c: QuantizeConfig, run: training.Run, dataset: data.Dataset
) -> tuple[dict, list[Path]]:
    """The end of a run: label the dataset, write the report card -> its numbers, files written"""
    model, _ = load_laq(run.out, "out")
    train_set, held_out = dataset.split(c.held_out)
    with run.processes.autocast():
        labels = run.out / "labels.safetensors"
        files = [write_labels(model, run.last_checkpoint, dataset, c.window, labels)]
        if not held_out:
            return {}, files
        numbers, more = report_card(model, train_set, held_out, c.window, run.out, c.seed)
    return numbers, files + more


def report_card(
    model: LAQ,
    train_set: list[data.Episode],
    held_out: list[data.Episode],
    window: float,
    out: Path,
    seed: int,
) -> tuple[dict, list[Path]]:
    """Report card and atlas (analysis/report_card.py) -> numbers, files written; nothing where
    analysis/ was deleted"""
    try:
        from analysis.report_card import report
    except ModuleNotFoundError as error:
        if error.name not in ("analysis", "analysis.report_card"):  # an empty folder may be left
            raise
        return {}, []
    return report(model, label, train_set, held_out, window, out, seed)


# ------------------------------------------------------------------------ more videos
@dataclass
class ApplyConfig:
    """The options of `label` and `report`"""

    laq: str = option(help="a quantize run or a converted checkpoint")
    data: str = option(help="dataset folder")
    out: str = option(help="label: file to write (.safetensors); report: folder")
    where: str = option("", "keep episodes with these fields")
    held_out: int = option(
        50, "report: episodes to report on; the probe is fitted on the rest; 0: all", 0
    )
    window: float = option(0.0, "seconds; 0: the window the LAQ was trained with")
    bf16: bool = option(False, "bfloat16 arithmetic; default: as the LAQ was trained")
    seed: int = option(0, "report: how pairs are drawn")


def laq_shape(meta: dict) -> dict:
    """A checkpoint's network.  Ours that do not say have the ReLU of older code."""
    shape = meta["model"]
    return {"code_relu": not shape.get("official_peg", False), **shape}


def keep_older_shape(options: QuantizeConfig) -> None:
    """A run of older code that is continued keeps its ReLU"""
    if (Path(options.out) / "latest").is_file():
        _, meta = common.open_checkpoint(options.out, "out", ("quantize",))
        options.code_relu = laq_shape(meta)["code_relu"]


def load_laq(path: str | Path, asked_by: str = "laq") -> tuple[LAQ, dict]:
    """A checkpoint's LAQ, in evaluation mode, and its meta"""
    weights, meta = common.load_checkpoint(path, asked_by, ("quantize",))
    with common.refuse(f"--{asked_by} {path}"):
        model = LAQ(LAQConfig(**laq_shape(meta)))
        load_strictly(model, weights)
    return model.to(training.set_up_device()).eval(), meta


def apply(command: str, c: ApplyConfig, given: set[str]) -> None:
    """Label other videos, or write a report card on them, with a finished LAQ"""
    room = importlib.util.find_spec("analysis")
    if command == "report" and (room is None or room.origin is None):  # None: an empty folder
        common.fail("report: it needs the folder analysis/, which is missing")
    model, meta = load_laq(c.laq)
    device = next(model.parameters()).device
    window = c.window or meta["window"]
    bf16 = c.bf16 if "bf16" in given else meta.get("options", {}).get("bf16", False)
    dataset = data.open_dataset(c.data, model.config.image_size, c.where)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if command == "label":
            files = [write_labels(model, common.latest(c.laq), dataset, window, Path(c.out))]
        else:
            train_set, held_out = dataset.split(c.held_out)
            _, files = report_card(
                model, train_set, held_out or train_set, window, Path(c.out), c.seed
            )
    print("wrote", ", ".join(map(str, files)))


if __name__ == "__main__":
    if sys.argv[1:2] in (["label"], ["report"]):
        apply(sys.argv[1], *common.parse_options(ApplyConfig, sys.argv[2:]))
    else:
        options, _ = common.parse_options(QuantizeConfig, sys.argv[1:], PRESETS)
        keep_older_shape(options)
        train(options)
