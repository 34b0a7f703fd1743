"""Stage 3, action finetuning (paper 3.3): swap the latent head for a robot-action head.

The body that learned to predict latent actions now learns, from a few labeled episodes, to predict
the robot's own: every dimension is cut into up to 256 bins of equal count, one token each.
SCRATCH, the paper's baseline, is this stage alone, from the base model.

    python finetune.py --init_from runs/demo/pretrain --data data/tabletop \\
        --where combination=seen --out runs/demo/finetune --preset tiny                # laptop
    python finetune.py --preset lapa --init_from lapa --data D --out O                 # one GPU
    torchrun --nproc_per_node 8 finetune.py --preset lapa --init_from lapa --data D --out O
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim import Optimizer

import common
import data
import sequences
import training
from common import option
from model import ACTION, LOW_RANK, VLA, VLAConfig, build_vla, full_tensor


@dataclass(kw_only=True)
class FinetuneConfig(training.TrainConfig):
    """The options of this stage; the network's shape comes from --init_from"""

    init_from: str = option(
        help="pretrain run: latent (LAPA), action (ACTIONVLA), idm (VPT), caption (SCRATCH)"
    )
    labelled: int = option(
        0, "labeled episodes, drawn by --seed (for a preset: at most); 0: all", 0
    )
    bins: int = option(256, "bins per dimension (paper)")
    soft_bins: float = option(
        0.0, "width, in bins, of a Gaussian around the true bin (paper 0: one-hot)"
    )
    binary: str = option(
        "", "dimensions that mean 0 or 1 (grippers), e.g. 6; other values: see data.py"
    )
    freeze_vision: bool = option(True, "keep the patch embedding as it is (paper 3.2)")
    shift: float = option(0.0, "random shift of pictures, as a fraction of them")
    length: int = option(
        0, "tokens a row is cut or padded to; 0: the longest of the batch (official 384)"
    )
    official_cut: bool = option(False, "cut rows have their loss mask off by one")
    like_tag: bool = option(False, "a new action table copies known rows (see VLA.start_from_tags)")
    freeze_table: bool = option(
        False, "freeze the action table: training it memorizes the few rows"
    )
    steps: int = option(2000, "optimization steps (paper: real robot; SIMPLER 500)")
    batch: int = option(128, "rows per step, over all processes")
    lr: float = option(2e-5, "AdamW 0.9/0.95, constant, no weight decay (code)")
    head_lr: float = option(
        1.0, "rate of the fresh action head and table (and LoRA), relative to lr"
    )
    lora_rank: int = option(
        0, "freeze the body except for updates of this rank (LoRA); 0: train all of it", 0
    )
    log_every: int = option(25, "steps between rows of the log")
    save_every: int = option(500, "steps between checkpoints; 0: only the last", 0)


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


def loss_of(
    model: VLA, rows: dict[str, Tensor], soft: float | list[float]
) -> tuple[Tensor, Tensor]:
    """Stage-3 loss (paper 3.3): cross entropy of the action tokens.  -> loss, accuracy"""
    hidden = model(rows["tokens"], rows["kinds"], rows["images"])
    return model.answer_loss(hidden, rows, ACTION, soft)


# ------------------------------------------------------------------------ LoRA
class LowRank(nn.Module):
    """y = W x + up (down x) in place of a linear layer: W is frozen, a low-rank update is
    learned, from 0 (LoRA, Hu et al. 2021).  [.., inputs] -> [.., outputs]"""

    def __init__(self, linear: nn.Linear, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.up = nn.Parameter(weight.new_empty(weight.shape[0], rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        nn.init.zeros_(self.up)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.down), self.up)


def add_low_rank(model: VLA, rank: int, dtype: torch.dtype) -> None:
    """Freeze a VLA except for its action table and head; every linear layer of its blocks learns a
    change of this rank, next to weights kept in dtype"""
    model.requires_grad_(False)
    model.action_embed.requires_grad_(True)
    model.action_head.requires_grad_(True)
    for block in model.layers:
        for name, linear in list(block.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(block, name, LowRank(linear, rank, dtype))


def merged_weights(model: VLA, original: dict[str, object]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a VLA, its low-rank changes added to the `original` weights"""
    state = model.state_dict()
    for name, tensor in state.items():
        stem = name.removesuffix("weight")
        if stem + "up" in state:
            change = full_tensor(state[stem + "up"]) @ full_tensor(state[stem + "down"])
            yield name, original[name][:] + change.cpu()
        elif not name.endswith(LOW_RANK):
            yield name, full_tensor(tensor)


# ------------------------------------------------------------------------ data, bins, model
def open_data(
    c: FinetuneConfig,
    image_size: int,
    vqgan: data.ImageTokenizer | None,
    exact: bool,
    processes: training.Processes,
) -> tuple[data.Dataset, list[data.Episode]]:
    """-> dataset, and the labelled episodes to learn from.  exact: refuse fewer than --labelled"""
    for_vqgan = vqgan is not None
    dataset = data.open_dataset(c.data, image_size, c.where, for_vqgan=for_vqgan)
    train_set, _ = dataset.split(c.held_out)
    labelled = data.labelled_few(train_set, c.labelled, c.seed, exact)
    if vqgan and not c.shift:  # shifted pictures are tokenized as they come, others once
        from official.image_codes import add_codes

        add_codes(dataset, labelled, vqgan, processes)
    return dataset, labelled


def choose_bins(c: FinetuneConfig, meta: dict, actions: np.ndarray) -> list[np.ndarray]:
    """-> bin edges, an array per dimension.  A body pretrained on actions (ACTIONVLA, VPT) keeps
    its own with its action head; any other gets those of the labeled episodes' actions [M, A]."""
    if "bins" not in meta:
        return data.fit_bins(actions, c.bins, c.binary)
    edges = [np.array(e) for e in meta["bins"]]
    width = actions.shape[1]
    if len(edges) != width:
        common.fail(
            f"{c.data}: actions have width {width}, --init_from {c.init_from} was trained on width "
            f"{len(edges)}"
        )
    guessed = meta["labels"] == "idm"
    data.refuse_other_values(edges, actions, f"--init_from {c.init_from}", guessed)
    return edges


def load_model(
    c: FinetuneConfig,
    weights: dict[str, object],
    meta: dict,
    tokenizer: Tokenizer,
    processes: training.Processes,
) -> tuple[VLA, list[str]]:
    """--init_from's body without its latent head, with an action head -> the placed model, names
    of fresh tensors.  A body pretrained on actions keeps its action head."""
    shape = meta["model"] | {"latent_vocab": 0}
    shape["action_vocab"] = shape["action_vocab"] or c.bins
    torch.manual_seed(c.seed)
    with common.refuse(f"--init_from {c.init_from}"):
        model = build_vla(VLAConfig(**shape))
        if c.lora_rank:
            add_low_rank(model, c.lora_rank, torch.bfloat16 if c.bf16 else torch.float32)
        training.place(model, c, processes, model.layers)
        fresh = model.load_pretrained(weights)
        if c.like_tag:
            model.start_from_tags(weights, fresh, sequences.opening_tags(tokenizer))
    new = [name for name in fresh if not name.endswith(LOW_RANK)]
    processes.say(
        f"inherited {c.init_from} (pretrained on {meta['labels']} labels, step {meta['step']}); "
        f"fresh: {', '.join(new) or 'nothing'}"
    )
    return model, fresh


def make_optimizer(model: VLA, c: FinetuneConfig, fresh: list[str]) -> Optimizer:
    """AdamW; fresh tensors learn at head_lr x lr; the vision side stays frozen"""
    model.action_embed.weight.requires_grad_(not c.freeze_table)
    if c.freeze_vision:
        model.freeze_vision()
    groups = model.parameter_groups(c.lr, c.head_lr, fresh)
    return training.make_optimizer(groups, betas=(0.9, 0.95), weight_decay=0.0)


# ------------------------------------------------------------------------ training
def train(c: FinetuneConfig, named_options: set[str]) -> None:
    """Learn the robot's actions from a few labelled episodes"""
    processes = training.start_processes(c)
    local_rows = processes.local_rows
    weights, meta = common.load_checkpoint(c.init_from, "init_from", ("pretrain",))
    tokenizer = sequences.read_tokenizer(c.init_from)
    vqgan = data.open_vqgan(c.init_from, "init_from", processes.device, meta["model"])
    image_size = meta["model"]["image_size"]
    exact = "labelled" in named_options  # of a preset, --labelled is a maximum
    dataset, labelled = open_data(c, image_size, vqgan, exact, processes)
    actions = np.concatenate([episode.actions for episode in labelled])
    edges = choose_bins(c, meta, actions)
    bins = [data.to_bins(episode.actions, edges) for episode in labelled]
    model, fresh = load_model(c, weights, meta, tokenizer, processes)
    processes.say(data.describe_bins(edges, actions))
    image_tokens = model.config.image_tokens
    row_builder = sequences.Sequences(
        tokenizer, image_tokens, meta["template"], c.length, c.official_cut
    )
    with common.refuse(c.data):
        row_builder.check(labelled, bins, ACTION)
    frame_counts = [len(answer) for answer in bins]
    sampler = data.FrameSampler(labelled, frame_counts, c.seed, c.batch, local_rows)

    def load_rows(step: int) -> dict[str, Tensor | None]:
        return row_builder.batch(labelled, bins, ACTION, sampler.frames(step), processes.device)

    run = open_run(c, processes, model, dataset, meta, edges, tokenizer, vqgan)
    optimizer = make_optimizer(model, c, fresh)
    run.resume(model, optimizer)
    processes.say(
        len(labelled), "labelled episodes,", sum(frame_counts), "actions,", processes.device
    )
    soft = data.soft_widths(edges, c.soft_bins)

    batches = data.stream(load_rows, run.start, c.steps)
    for step, batch in run.steps(batches, "rows"):
        training.set_learning_rate(optimizer, c, step)
        batch = sequences.augment(batch, c.shift, vqgan, c.batch, local_rows)
        results = []
        for part in processes.micro_batches(model, batch):  # --accumulate
            with processes.autocast():  # --bf16
                loss, accuracy = loss_of(model, part, soft)
            run.refuse_not_finite("loss", loss, step, sampler)
            (loss / c.accumulate).backward()
            results.append((loss.detach(), accuracy))
        grad_norm = processes.clip_gradients(optimizer)  # --clip
        run.refuse_not_finite("gradient norm", grad_norm, step, sampler)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if run.log_due(step):
            loss, accuracy = (torch.stack(values).mean() for values in zip(*results, strict=True))
            run.log(step, {"loss": loss, "accuracy": accuracy, "grad_norm": grad_norm})
        if run.stop_requested() or run.save_due(step):
            merged = partial(merged_weights, model, weights) if c.lora_rank else None
            run.save(step, model, optimizer, merged)
    run.finish()


def open_run(
    c: FinetuneConfig,
    processes: training.Processes,
    model: VLA,
    dataset: data.Dataset,
    pretrained: dict,
    edges: list[np.ndarray],
    tokenizer: Tokenizer,
    vqgan: data.ImageTokenizer | None,
) -> training.Run:
    """The run folder, with what a resumed run has to agree on and what a policy needs.

    pretrained: config.json of --init_from"""
    identity = {
        "dataset": dataset.fingerprint,
        "init_from": common.fingerprint(c.init_from),
        "vqgan": vqgan and vqgan.mark,
    }
    notes = {
        "labels": pretrained["labels"],
        "template": pretrained["template"],
        "bins": [list(e) for e in edges],
    }
    files = {"tokenizer.json": tokenizer.to_str()}
    if vqgan:
        notes["vqgan"] = vqgan.config.__dict__
        files["vqgan.safetensors"] = vqgan.file
    return training.Run(c, processes, "finetune", model.config, identity, notes, files)


if __name__ == "__main__":
    train(*common.parse_options(FinetuneConfig, sys.argv[1:], PRESETS))
