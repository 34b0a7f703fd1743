"""Stage 1, latent action quantization (paper 3.1): name what changed between two frames.

An encoder looks at a frame and a frame 0.6 s later and writes down 4 codes out of 8; a decoder must
draw the later frame from the first one and those codes.  No action labels are used.  Afterwards
every frame of the dataset is labelled with its latent action, and a report card is written.

    python quantize.py --data data/tabletop --out runs/demo/quantize --preset tiny     # laptop
    python quantize.py --data D --out O --preset lapa                                  # one GPU
    torchrun --nproc_per_node 8 quantize.py --data D --out O --preset lapa             # eight GPUs
    python quantize.py label --laq O --data OTHER --out other.safetensors    # label more videos
    python quantize.py report --laq O --data OTHER --out reports/other     # report card on them"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import data
from model import LAQ, LAQConfig, load_strictly


@dataclass(kw_only=True)
class QuantizeConfig(LAQConfig, common.TrainConfig):
    """The options of this stage, on top of the network's shape."""

    window: float = 0.6  # seconds from x_t to x_{t+H} (paper: 0.6; Something-Something 2.5)
    shift: float = 0.0  # common random shift of what the encoder sees, as a share of the image
    shift_from: int = 0  # step at which the shift starts to grow from 0
    shift_until: int = 0  # step from which it is whole
    steps: int = 100_000
    batch: int = 64  # pairs a step, over all processes
    lr: float = 1e-4  # Adam, betas 0.9/0.99, no weight decay (code)
    codebook_lr: float = 1.0  # codebook rate relative to lr
    codebook_pull: float = 0.0  # share of the way a used entry moves to its outputs' mean each step
    clip: float = 0.5  # gradient norm
    replace_below: float = 0.1  # an entry used less than this share of a fair share is dead


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
def replacement_due(step, official=False):
    """Dead codes are replaced often at first, then every 50 steps; officially before step 5000"""
    if official:
        return 0 < step < 5000 and step % (10 if step < 100 else 100 if step < 1000 else 500) == 0
    return step > 0 and step % (10 if step < 100 else 50) == 0


def train_step(model, optimizer, processes, c, step, pair, who=str):
    """One optimization step on this process's pairs [B, 2, 3, H, W] in [0, 1] -> numbers to log"""
    mine = processes.share(c)
    # Codes first have to help the decoder at all: the shift grows once they begin to.
    grown = (step - c.shift_from + 1) / max(1, c.shift_until - c.shift_from)
    share = c.shift * min(1.0, max(0.0, grown))
    seen = data.random_shift(pair, share, c.batch, mine) if share else None
    noise = torch.randn(c.batch, c.code_len, c.quant_dim)[mine].to(pair.device)
    loss, d, indices = processes.backward(
        model, c, lambda part: model(**part), {"pair": pair, "seen": seen, "noise": noise}, who
    )
    norm = common.optimizer_step(optimizer, processes, c, step)
    d, indices = processes.gather(d.detach()), processes.gather(indices)
    model.quantizer.count_uses(indices)
    model.quantizer.pull_to_means(d, indices, c.codebook_pull)
    if replacement_due(step + 1, c.official_counting):
        model.quantizer.replace_dead_codes(d, c.replace_below)
    return {"loss": loss, "codes": len(indices.unique()), "grad_norm": norm}


def make_optimizer(model, c):
    codebook = model.quantizer.codebook
    rest = [p for p in model.parameters() if p is not codebook]
    groups = [{"params": rest, "lr": c.lr}, {"params": [codebook], "lr": c.lr * c.codebook_lr}]
    return common.make_optimizer(groups, torch.optim.Adam, betas=(0.9, 0.99))


def train(c):
    processes = common.Processes()
    common.refuse_busy(c.out)
    if (Path(c.out) / "latest").is_file():
        meta = common.open_checkpoint(c.out, "out", ("quantize",))[1]
        c.code_relu = laq_shape(meta)["code_relu"]
    shape = LAQConfig(**{f.name: getattr(c, f.name) for f in fields(LAQConfig)})
    torch.manual_seed(c.seed)
    with common.refuse("network"):
        model = LAQ(shape)
    mine = processes.share(c)
    dataset = data.open_dataset(c.data, c.image_size, c.where)
    train_set, held_out = dataset.split(c.held_out)
    run = common.Run(c, processes, "quantize", shape, dataset=dataset.fingerprint)
    processes.shard(model, c, model.blocks, whole=[model.quantizer.codebook])
    optimizer = make_optimizer(model, c)
    lengths = [len(e.frames) for e in train_set]
    which = lambda step: data.draw(c.seed, step, c.batch, lengths)[mine]
    run.restore(
        model,
        optimizer,
        {"window": c.window},
        {},
        lambda step: [train_set[e].id for e, _ in which(step)],
    )
    size = sum(p.numel() for p in model.parameters())
    processes.say(
        f"LAQ of {size:,} parameters, {len(train_set)} episodes to learn from, "
        f"{len(held_out)} held out, {processes.device}"
    )

    batch = lambda step: data.to_float(
        data.frame_pairs(train_set, which(step), c.window), processes.device
    )
    for step, pair in run.loop("pairs", data.stream(batch, run.start, c.steps)):
        run.end_step(train_step(model, optimizer, processes, c, step, pair, run.culprits))
    summary, files = {}, []
    if processes.main:
        model, _ = load_laq(run.out, "out")
        with processes.autocast(c):
            files = [
                write_labels(model, run.found, dataset, c.window, run.out / "labels.safetensors")
            ]
            if held_out:
                summary, more = report_card(model, train_set, held_out, c.window, run.out, c.seed)
                files += more
    run.finish(summary, files)


# ------------------------------------------------------------------------ labels, report card
def label(model, episodes, window, batch=256):
    """The latent action of every frame of every episode -> {id: int64 [T, K]}"""
    device = next(model.parameters()).device
    rows = [(e, t) for e, episode in enumerate(episodes) for t in range(len(episode.frames))]
    codes = []
    for at in tqdm(range(0, len(rows), batch), desc="labels", leave=False, mininterval=1.0):
        pair = data.frame_pairs(episodes, rows[at : at + batch], window)
        codes.append(model.label(data.to_float(pair, device)).cpu().numpy())
    ends = np.cumsum([len(e.frames) for e in episodes])[:-1]
    return {e.id: part for e, part in zip(episodes, np.split(np.concatenate(codes), ends))}


def write_labels(model, checkpoint, dataset, window, path):
    data.save_labels(
        path,
        label(model, dataset.episodes, window),
        {
            "laq": common.fingerprint(checkpoint),
            "window": window,
            "dataset": dataset.fingerprint,
            "codebook_size": model.config.codebook_size,
            "code_len": model.config.code_len,
        },
    )
    return path


def report_card(model, train_set, held_out, window, out, seed):
    """Report card and atlas (see analysis/report_card.py) -> numbers, files written; nothing in a
    copy of the code that has no analysis room"""
    try:
        from analysis.report_card import report
    except ModuleNotFoundError as error:
        if error.name != "analysis":
            raise
        return {}, []
    return report(model, label, train_set, held_out, window, out, seed)


# ------------------------------------------------------------------------ more videos
@dataclass
class ApplyConfig:
    laq: str  # a quantize run or a converted checkpoint
    data: str  # dataset folder
    out: str  # label: file to write (.safetensors); report: folder
    where: str = ""  # keep episodes with these fields
    held_out: int = 50  # report: episodes it is about; the probe is fitted on the others
    window: float = 0.0  # seconds; 0: the window the LAQ was trained with
    bf16: bool = False  # bfloat16 arithmetic; unless named: as the LAQ was trained
    seed: int = 0


def laq_shape(meta):
    """A checkpoint's network.  Our own ones that do not tell have the ReLU of older code."""
    shape = meta["model"]
    return {"code_relu": not shape.get("official_peg", False), **shape}


def load_laq(path, option="laq"):
    """A checkpoint's LAQ, in evaluation mode, and its meta"""
    weights, meta = common.load_checkpoint(path, option, ("quantize",))
    with common.refuse(f"--{option} {path}"):
        model = LAQ(LAQConfig(**laq_shape(meta)))
        load_strictly(model, weights)
    return model.to(common.Processes().device).eval(), meta


def apply(command, c, given):
    model, meta = load_laq(c.laq)
    window = c.window or meta["window"]
    if "bf16" not in given:
        c.bf16 = meta.get("options", {}).get("bf16", False)
    dataset = data.open_dataset(c.data, model.config.image_size, c.where)
    with common.Processes().autocast(c):
        if command == "label":
            files = [write_labels(model, common.latest(c.laq), dataset, window, Path(c.out))]
        else:
            train_set, held_out = dataset.split(c.held_out)
            _, files = report_card(model, train_set, held_out or train_set, window, c.out, c.seed)
    print("wrote", ", ".join(map(str, files)))


if __name__ == "__main__":
    if sys.argv[1:2] in (["label"], ["report"]):
        apply(sys.argv[1], *common.parse_options(ApplyConfig, sys.argv[2:]))
    else:
        train(common.parse_options(QuantizeConfig, sys.argv[1:], PRESETS)[0])
