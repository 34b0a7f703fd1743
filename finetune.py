"""Stage 3, action finetuning (paper 3.3): swap the latent head for a robot-action head.

The body that learned to predict latent actions now learns, from a few labelled episodes, to predict
the robot's own: every dimension is cut into up to 256 bins of equal count, one token each.
SCRATCH, the paper's baseline, is this stage alone, from the base model.

    python finetune.py --init_from runs/demo/pretrain --data data/tabletop \\
        --where combination=seen --out runs/demo/finetune --preset tiny                    # laptop
    torchrun --nproc_per_node 8 finetune.py --init_from L --data D --out O --preset lapa  # 8 GPUs
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch

import common
import data
from model import ACTION, VLA, VLAConfig


@dataclass(kw_only=True)
class FinetuneConfig:
    data: str  # dataset folder; only episodes with actions count
    out: str  # run folder
    init_from: str  # pretrain run: latent (LAPA), action (ACTIONVLA), idm (VPT), caption (SCRATCH)
    preset: str = "lapa"  # named recipe: tiny, base or lapa (the paper's)
    where: str = ""  # keep episodes with these fields, e.g. combination=seen
    labelled: int = 0  # labelled episodes to use, drawn by --seed; 0: all that are not held out
    held_out: int = 50  # episodes of the dataset that are never used here; 0: none
    bins: int = 256  # bins a dimension (paper)
    soft_bins: float = 0.0  # width, in bins, of a Gaussian around the true bin (paper 0: one-hot)
    binary: str = ""  # dimensions with two values (grippers), e.g. 6
    freeze_vision: bool = True  # paper 3.2
    shift: float = 0.0  # random shift of pictures, as a share of them
    like_tag: bool = False  # a fresh action table begins readable (see VLA.adopt)
    freeze_table: bool = False  # keep the action table: few rows are learned by heart through it
    steps: int = 2000  # paper: real robot; SIMPLER 500
    batch: int = 128  # rows a step, over all processes
    lr: float = 2e-5  # AdamW 0.9/0.95, constant, no weight decay (code)
    head_lr: float = 1.0  # rate of the fresh action head and table, relative to lr
    warmup: int = 0  # steps
    final_lr: float = 1.0  # cosine down to this share of lr
    clip: float = 1.0  # gradient norm
    seed: int = 0
    log_every: int = 25  # steps
    save_every: int = 500  # steps between checkpoints; 0: only the last
    resume: bool = False  # continue from the latest checkpoint in --out


PRESETS = {
    "tiny": dict(labelled=100, soft_bins=8.0, steps=150, batch=64, lr=4e-4, head_lr=10.0, warmup=10,
                 final_lr=0.1, shift=0.0625, like_tag=True, freeze_table=True),
    "base": dict(soft_bins=8.0, lr=1e-4, head_lr=4.0, warmup=50, final_lr=0.1, shift=0.0625,
                 like_tag=True, freeze_table=True),
    "lapa": {},
}


def loss_of(model, rows, soft):
    """Stage-3 loss (formats section 6): cross entropy of the action tokens.  -> loss, accuracy"""
    hidden = model(rows["tokens"], rows["kinds"], rows["images"])
    return model.answer_loss(hidden, rows, ACTION, soft)


def build_model(c, few, processes):
    """The pretrained body with an action head -> model, bin edges, tokenizer, template, fresh.

    A body pretrained on actions (ACTIONVLA, VPT) keeps its action head and bins; any other gets a
    fresh head and the labelled episodes' bins."""
    weights, meta = common.load_checkpoint(c.init_from, "init_from", ("pretrain",))
    width = few[0].actions.shape[1]
    if "bins" in meta:
        edges = [np.array(e) for e in meta["bins"]]
        if len(edges) != width:
            common.fail(f"{c.data}: actions have width {width}, --init_from {c.init_from} was "
                        f"trained on width {len(edges)}")
    else:
        edges = data.fit_bins(np.concatenate([e.actions for e in few]), c.bins, c.binary)
    bins = meta["model"]["action_vocab"] or c.bins
    torch.manual_seed(c.seed)
    model = VLA(VLAConfig(**{**meta["model"], "latent_vocab": 0, "action_vocab": bins}))
    tokenizer = data.read_tokenizer(common.find_checkpoint(c.init_from, "init_from")
                                    / "tokenizer.json")
    with common.refuse(f"--init_from {c.init_from}"):
        fresh = model.adopt(weights, data.opening_tags(tokenizer) if c.like_tag else None)
    processes.say(f"inherited {c.init_from} (pretrained on {meta['labels']} labels, step "
                  f"{meta['step']}); fresh: {', '.join(fresh) or 'nothing'}; bins a dimension: "
                  f"{', '.join(str(max(1, len(e) - 1)) for e in edges)}")
    return model, edges, tokenizer, meta["template"], fresh


def train(c):
    processes = common.Processes()
    mine = processes.share(c.batch)
    meta = common.read_meta(c.init_from, "init_from", ("pretrain",))
    dataset = data.open_dataset(c.data, meta["model"]["image_size"], c.where, actions_needed=True)
    train_set, _ = dataset.split(c.held_out)
    few = data.labelled_few(train_set, c.labelled or len(train_set), c.seed)
    model, edges, tokenizer, template, fresh = build_model(c, few, processes)
    origin = common.fingerprint(common.find_checkpoint(c.init_from, "init_from"))
    run = common.Run(c, processes, "finetune",
                     {"data": dataset.fingerprint, "where": c.where, "labelled": c.labelled,
                      "seed": c.seed, "batch": c.batch, "init_from": origin,
                      "model": model.config.__dict__})
    processes.shard(model)
    model.action_embed.weight.requires_grad_(not c.freeze_table)
    groups = model.parameter_groups(c.lr, c.head_lr, fresh, c.freeze_vision)
    optimizer = common.make_optimizer(groups, betas=(0.9, 0.95), weight_decay=0.0)
    run.restore(model, optimizer)
    sequences = data.Sequences(tokenizer, model.image_tokens, template)
    bins = [data.to_bins(e.actions, edges) for e in few]
    lengths = [len(b) for b in bins]
    def rows(step):
        which = data.draw(c.seed, step, c.batch, lengths)[mine]
        return sequences.batch(few, bins, ACTION, which, processes.device)
    known = np.concatenate([e.actions for e in few])
    meta = {"model": model.config.__dict__, "template": template, "bins": [list(e) for e in edges],
            "action_mean": known.mean(0).tolist(), "action_std": known.std(0).tolist(),
            "labels": meta["labels"], "options": c.__dict__}
    texts = {"tokenizer.json": tokenizer.to_str()}
    processes.say(f"{len(few)} labelled episodes, {sum(lengths)} actions of width {len(edges)}, "
                  f"{processes.device}")

    batches, numbers = data.stream(rows, run.start, c.steps), {}
    for step in run.loop("rows"):
        common.seed_step(c.seed, step, processes.rank)
        batch = next(batches)
        batch["images"] = data.random_shift(batch["images"], c.shift)
        loss, right = loss_of(model, batch, c.soft_bins)
        loss.backward()
        norm = common.optimizer_step(optimizer, processes, c, step)
        if (step + 1) % c.log_every == 0 or step + 1 == c.steps:
            numbers = {"loss": loss.item(), "accuracy": right.item(), "grad_norm": norm}
            run.record(step + 1, c.batch, **numbers)
        run.save(step + 1, model, optimizer, meta, texts)
    run.finish(numbers, [])


if __name__ == "__main__":
    train(common.parse_options(FinetuneConfig, sys.argv[1:], PRESETS, "finetune.py [options]")[0])
