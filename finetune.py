"""Stage 3, action finetuning (paper 3.3): swap the latent head for a robot-action head.

The body that learned to predict latent actions now learns, from a few labelled episodes, to predict
the robot's own: every dimension is cut into up to 256 bins of equal count, one token each.
SCRATCH, the paper's baseline, is this stage alone, from the base model.

    python finetune.py --init_from runs/demo/pretrain --data data/tabletop \\
        --where combination=seen --out runs/demo/finetune --preset tiny                # laptop
    python finetune.py --preset lapa --init_from lapa --data D --out O                 # one GPU
    torchrun --nproc_per_node 8 finetune.py --preset lapa --init_from lapa --data D --out O
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
import data
import sequences
from model import ACTION, LOW_RANK, VLAConfig, build_vla, full_tensor


@dataclass(kw_only=True)
class FinetuneConfig(common.TrainConfig):
    init_from: str  # pretrain run: latent (LAPA), action (ACTIONVLA), idm (VPT), caption (SCRATCH)
    labelled: int = 0  # labelled episodes, drawn by --seed (of a preset: at most); 0: all
    bins: int = 256  # bins a dimension (paper)
    soft_bins: float = 0.0  # width, in bins, of a Gaussian around the true bin (paper 0: one-hot)
    binary: str = ""  # dimensions that mean 0 or 1 (grippers), e.g. 6; other values: see data.py
    freeze_vision: bool = True  # paper 3.2
    shift: float = 0.0  # random shift of pictures, as a share of them
    length: int = 0  # tokens a row is cut or padded to; 0: the longest of the batch (official 384)
    official_cut: bool = False  # cut rows have their loss mask one step too far
    like_tag: bool = False  # a fresh action table begins readable (see VLA.start_from_tags)
    freeze_table: bool = False  # keep the action table: few rows are learned by heart through it
    steps: int = 2000  # paper: real robot; SIMPLER 500
    batch: int = 128  # rows a step, over all processes
    lr: float = 2e-5  # AdamW 0.9/0.95, constant, no weight decay (code)
    head_lr: float = 1.0  # rate of the fresh action head and table (and LoRA), relative to lr
    lora_rank: int = 0  # freeze the body but for changes of this rank (LoRA); 0: all of it learns
    log_every: int = 25  # steps
    save_every: int = 500  # steps between checkpoints; 0: only the last


PRESETS = {
    "tiny": dict(
        labelled=100,
        soft_bins=8.0,
        steps=150,
        batch=64,
        lr=4e-4,
        head_lr=10.0,
        warmup=10,
        final_lr=0.1,
        shift=0.0625,
        like_tag=True,
        freeze_table=True,
    ),
    "base": dict(
        soft_bins=8.0,
        lr=1e-4,
        head_lr=4.0,
        warmup=50,
        final_lr=0.1,
        shift=0.0625,
        like_tag=True,
        freeze_table=True,
        bf16=True,
    ),
    "lapa": dict(length=384, bf16=True),
}


def loss_of(model, rows, soft):
    """Stage-3 loss (paper 3.3): cross entropy of the action tokens.  -> loss, accuracy"""
    hidden = model(rows["tokens"], rows["kinds"], rows["images"])
    return model.answer_loss(hidden, rows, ACTION, soft)


# ------------------------------------------------------------------------ LoRA
class LowRank(nn.Module):
    """y = W x + up (down x) in the place of a linear layer: W is frozen, a change of low rank is
    learned, from 0 on (LoRA, Hu et al. 2021).  [.., inputs] -> [.., outputs]"""

    def __init__(self, linear, rank, dtype):
        super().__init__()
        W = linear.weight.detach()
        self.weight = nn.Parameter(W.to(dtype), requires_grad=False)
        self.down = nn.Parameter(W.new_empty(rank, W.shape[1]))
        self.up = nn.Parameter(W.new_empty(W.shape[0], rank))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        nn.init.zeros_(self.up)

    def forward(self, x):
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.down), self.up)


def add_low_rank(model, rank, dtype):
    """Freeze a VLA but for its action table and head; every linear layer of its blocks learns a
    change of this rank, beside weights kept in dtype"""
    model.requires_grad_(False)
    model.action_embed.requires_grad_(True)
    model.action_head.requires_grad_(True)
    for block in model.layers:
        for name, linear in list(block.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(block, name, LowRank(linear, rank, dtype))


def merged(model, weights):
    """(name, tensor) of a VLA, low-rank changes added to the `weights` that they began from"""
    state = model.state_dict()
    for name, tensor in state.items():
        stem = name.removesuffix("weight")
        if stem + "up" in state:
            change = full_tensor(state[stem + "up"]) @ full_tensor(state[stem + "down"])
            yield name, weights[name][:] + change.cpu()
        elif not name.endswith(LOW_RANK):
            yield name, full_tensor(tensor)


# ------------------------------------------------------------------------ training
def choose_bins(c, meta, actions):
    """-> bin edges, an array a dimension.  A body pretrained on actions (ACTIONVLA, VPT) keeps its
    own with its action head; any other gets those of the labelled episodes' actions [M, A]."""
    if "bins" not in meta:
        return data.fit_bins(actions, c.bins, c.binary)
    edges, width = [np.array(e) for e in meta["bins"]], actions.shape[1]
    if len(edges) != width:
        common.fail(
            f"{c.data}: actions have width {width}, --init_from {c.init_from} was "
            f"trained on width {len(edges)}"
        )
    data.refuse_other_values(
        edges, actions, f"--init_from {c.init_from}", guessed=meta["labels"] == "idm"
    )
    return edges


def train(c, given):
    processes = common.Processes()
    common.refuse_busy(c.out)
    mine = processes.share(c)
    weights, meta = common.load_checkpoint(c.init_from, "init_from", ("pretrain",))
    tokenizer, shape = sequences.read_tokenizer(c.init_from), meta["model"]
    vqgan = data.open_vqgan(c.init_from, "init_from", processes.device, shape)
    dataset = data.open_dataset(c.data, shape["image_size"], c.where, official=vqgan is not None)
    train_set, _ = dataset.split(c.held_out)
    few = data.labelled_few(train_set, c.labelled, c.seed, exact="labelled" in given)
    actions = np.concatenate([e.actions for e in few])
    edges = choose_bins(c, meta, actions)
    torch.manual_seed(c.seed)
    with common.refuse(f"--init_from {c.init_from}"):
        model = build_vla(
            VLAConfig(
                **{**shape, "latent_vocab": 0, "action_vocab": shape["action_vocab"] or c.bins}
            )
        )
        if c.lora_rank:
            add_low_rank(model, c.lora_rank, torch.bfloat16 if c.bf16 else torch.float32)
        processes.shard(model, c, model.layers)
        fresh = model.load_pretrained(weights)
        if c.like_tag:
            model.start_from_tags(weights, fresh, sequences.opening_tags(tokenizer))
    new = [name for name in fresh if not name.endswith(LOW_RANK)]
    processes.say(
        f"inherited {c.init_from} (pretrained on {meta['labels']} labels, step "
        f"{meta['step']}); fresh: {', '.join(new) or 'nothing'}"
    )
    processes.say(data.describe_bins(edges, actions))
    bins = [data.to_bins(e.actions, edges) for e in few]
    rows_of = sequences.Sequences(
        tokenizer, model.config.image_tokens, meta["template"], c.length, c.official_cut
    )
    with common.refuse(c.data):
        rows_of.check(few, bins, ACTION)
    run = common.Run(
        c,
        processes,
        "finetune",
        model.config,
        dataset=dataset.fingerprint,
        init_from=common.fingerprint(c.init_from),
        vqgan=vqgan and vqgan.mark,
    )
    model.action_embed.weight.requires_grad_(not c.freeze_table)
    groups = model.parameter_groups(c.lr, c.head_lr, fresh, c.freeze_vision)
    optimizer = common.make_optimizer(groups, betas=(0.9, 0.95), weight_decay=0.0)
    meta = {
        "labels": meta["labels"],
        "template": meta["template"],
        "bins": [list(e) for e in edges],
    }
    files = {"tokenizer.json": tokenizer.to_str()}
    if vqgan:
        meta["vqgan"], files["vqgan.safetensors"] = vqgan.config.__dict__, vqgan.file
    which = lambda step: data.draw(c.seed, step, c.batch, [len(b) for b in bins])[mine]
    run.restore(
        model,
        optimizer,
        meta,
        files,
        lambda step: [few[e].id for e, _ in which(step)],
        lambda: merged(model, weights),
    )
    if vqgan and not c.shift:  # shifted pictures are tokenised as they come, others once
        data.add_codes(dataset, few, vqgan, processes)
    processes.say(len(few), "labelled episodes,", sum(map(len, bins)), "actions,", processes.device)

    soft = data.soft_widths(edges, c.soft_bins)
    rows = lambda step: rows_of.batch(few, bins, ACTION, which(step), processes.device)
    for step, batch in run.loop("rows", data.stream(rows, run.start, c.steps)):
        batch = sequences.augment(batch, c.shift, vqgan, c.batch, mine)
        loss, right = processes.backward(
            model, c, lambda part: loss_of(model, part, soft), batch, run.culprits
        )
        norm = common.optimizer_step(optimizer, processes, c, step)
        run.end_step({"loss": loss, "accuracy": right, "grad_norm": norm})
    run.finish()


if __name__ == "__main__":
    train(*common.parse_options(FinetuneConfig, sys.argv[1:], PRESETS))
