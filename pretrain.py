"""Stage 2, latent pretraining (paper 3.2): predict latent actions from image and instruction.

One loop serves every arm of the paper's comparison; they differ only in what they predict:
    --labels latent    LAPA: the codes that quantize.py wrote for each frame
    --labels action    ACTIONVLA: the true actions of all episodes (the upper bound)
    --labels idm       VPT: actions guessed by an inverse dynamics model trained on the labelled few
    --labels caption   the base phase: describe still scenes.  It stands in for LWM, the pretrained
                       vision-language model that all of the paper's arms start from.

    python pretrain.py --labels caption --data data/scenes --out runs/base --preset tiny
    python pretrain.py --labels latent --data data/tabletop --laq runs/demo/quantize \\
        --init_from runs/base --out runs/demo/pretrain --preset tiny                   # laptop
    python pretrain.py --preset lapa --init_from lwm --laq Q --data D --out O          # one GPU
    torchrun --nproc_per_node 8 pretrain.py --preset lapa --init_from lwm --laq Q --data D --out O
"""

import hashlib
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import common
import data
import quantize
import sequences
from model import ACTION, LAQ, LATENT, TEXT, VLAConfig, build_vla

KINDS = {"latent": LATENT, "action": ACTION, "idm": ACTION, "caption": TEXT}
NEXT = 0.0  # a window of 0 s reaches to the next frame


@dataclass(kw_only=True)
class PretrainConfig(VLAConfig, common.TrainConfig):
    """The options of this stage, on top of the network's shape (which --init_from settles)."""

    labels: str = "latent"  # what to predict: latent, action, idm or caption
    laq: str = ""  # quantize run whose latent actions are predicted
    latents: str = ""  # labels file; empty: the one inside --laq
    init_from: str = ""  # checkpoint to start from; empty: random weights
    vqgan: str = ""  # where the image tokenizer of a model with vision codes is; empty: --init_from
    freeze_vision: bool = True  # paper 3.2; without --init_from the vision side is trained
    template: str = "{instruction}"  # text around the instruction
    length: int = 0  # tokens a row is cut or padded to; 0: the longest of the batch (official 384)
    official_cut: bool = False  # cut rows have their loss mask one step too far
    official_text_mask: bool = False  # the text loss also trains latent positions, toward token 0
    shift: float = 0.0  # latent and action labels: random shift of pictures, as a share of them
    like_tag: bool = False  # fresh input tables begin as the opening tag does (official: random)
    steps: int = 70_000  # paper, Open-X
    batch: int = 128  # rows a step, over all processes (paper 128, code 256)
    lr: float = 2e-5  # AdamW 0.9/0.95, constant, no weight decay (code)
    head_lr: float = 1.0  # rate of a fresh head and its table, relative to lr
    bins: int = 256  # action labels: bins a dimension
    soft_bins: float = 0.0  # action labels: width, in bins, of a Gaussian around the true one
    binary: str = ""  # action labels: dimensions that mean 0 or 1 (grippers), e.g. 6
    labelled: int = 100  # idm: labelled episodes the inverse dynamics model may learn from
    labelled_data: str = ""  # idm: where they are; empty: --data
    labelled_where: str = ""  # idm: and which, e.g. combination=seen
    idm_steps: int = 400  # idm: steps of 64 pairs


PRESETS = {
    "tiny": dict(
        dim=128,
        layers=4,
        heads=4,
        mlp=344,
        rope_theta=1e4,
        vision_vocab=0,
        image_size=64,
        steps=1000,
        batch=64,
        lr=8e-4,
        head_lr=2.0,
        warmup=30,
        final_lr=0.1,
        soft_bins=8.0,
        shift=0.0625,
        like_tag=True,
        save_every=250,
    ),
    "base": dict(
        dim=768,
        layers=12,
        heads=12,
        mlp=2048,
        rope_theta=1e4,
        vision_vocab=0,
        image_size=128,
        steps=20_000,
        lr=3e-4,
        head_lr=2.0,
        warmup=300,
        final_lr=0.1,
        soft_bins=8.0,
        shift=0.0625,
        like_tag=True,
        bf16=True,
    ),
    "lapa": dict(template=sequences.OFFICIAL_TEMPLATE, length=384, bf16=True),
}


def loss_of(model, rows, kind, soft=0.0, official_text_mask=False):
    """Stage-2 loss (paper 3.2, code): 0.99 x cross entropy of the labels + 0.01 x that of the
    tags around them and eos; for captions, whose labels are text, plain cross entropy.

    rows: a batch as made by sequences.Sequences.batch.  -> loss, share of labels predicted exactly"""
    hidden = model(rows["tokens"], rows["kinds"], rows["images"])
    text, text_right = model.answer_loss(hidden, rows, TEXT)
    if kind == TEXT:
        return text, text_right
    if official_text_mask:  # L * (1 - V * (1 - D)) by a misplaced parenthesis
        latent = rows["target_kinds"] == LATENT
        changed = {
            "targets": rows["targets"].where(~latent, 0),
            "target_kinds": rows["target_kinds"].where(~latent, TEXT),
        }
        text, _ = model.answer_loss(hidden, rows | changed, TEXT)
    # Neighbouring bins are alike; neighbouring codes are not.
    loss, right = model.answer_loss(hidden, rows, kind, soft if kind == ACTION else 0.0)
    return 0.99 * loss + 0.01 * text, right


# ------------------------------------------------------------------------ labels
@torch.no_grad()
def invert(idm, scale, episodes):
    """Actions an inverse dynamics model reads off every frame and its successor: list of [T, A]"""
    guessed = []
    for e in episodes:
        pairs = data.frame_pairs([e], [(0, t) for t in range(len(e.frames))], NEXT)
        change = idm["encoder"].difference(data.to_float(pairs, scale.device))
        guess = idm["head"](change.flatten(1)) * scale[1] + scale[0]
        guess[-1] = guess[-2]  # nothing follows the last frame
        guessed.append(guess.cpu().numpy())
    return guessed


def train_inverse_dynamics(c, processes, few):
    """VPT's inverse dynamics model: a fresh stage-1 encoder and a linear head, regressing a_t from
    (x_t, x_{t+1}) of the labelled few.  -> modules, [mean, std] of the actions"""
    torch.manual_seed(c.seed)
    base = quantize.QuantizeConfig(data="", out="", **quantize.PRESETS[c.preset])
    patch = c.image_size // base.grid  # the LAQ's grid of patches, on the VLA's pictures
    encoder = LAQ(replace(base, image_size=patch * base.grid, patch_size=patch))
    known = np.concatenate([e.actions for e in few])
    width = encoder.config.code_len * encoder.config.quant_dim
    idm = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(width, known.shape[1])})
    idm.to(processes.device)
    scale = torch.from_numpy(np.stack([known.mean(0), known.std(0) + 1e-6])).to(processes.device)
    optimizer = common.make_optimizer([{"params": idm.parameters(), "lr": 1e-3}])
    lengths = [min(len(e.actions), len(e.frames) - 1) for e in few]
    recipe = replace(c, steps=c.idm_steps, warmup=20, final_lr=0.05, clip=1.0)
    for step in tqdm(
        range(c.idm_steps),
        desc="inverse dynamics",
        mininterval=1.0,
        leave=False,
        disable=not processes.main,
    ):
        common.seed_step(c.seed, step)
        which = data.draw(c.seed, step, 64, lengths)
        pair = data.to_float(data.frame_pairs(few, which, NEXT), processes.device)
        pair = data.random_shift(pair, 0.25)  # same motion, same label
        target = torch.from_numpy(np.stack([few[e].actions[t] for e, t in which])).to(pair.device)
        guess = idm["head"](encoder.difference(pair).flatten(1))
        loss = ((guess - (target - scale[0]) / scale[1]) ** 2).mean()
        loss.backward()
        common.optimizer_step(optimizer, processes, recipe, step)
    return idm.eval(), scale


def answers_for(c, processes, dataset, train_set, held_out):
    """What the model shall say at every frame -> answers of the training and of the held-out
    episodes (lists of [T, n] codes or bins, or of T captions), what the checkpoint keeps, and marks
    of the files they were read from, by which a resumed run knows them"""
    both, marks = train_set + held_out, {}
    if c.labels == "caption":
        missing = [e.id for e in both if not e.info.get("captions")]
        if missing:
            common.fail(
                f"{c.data}/episodes.jsonl: episode {missing[0]!r}: field captions: "
                "missing, and --labels caption needs it"
            )
        answers, kept = [e.info["captions"] for e in both], {}
    elif c.labels == "latent":
        run = Path(c.laq)  # or a checkpoint in it
        if not (run / "labels.safetensors").is_file() and common.latest(run.parent) == run:
            run = run.parent
        path = Path(c.latents or run / "labels.safetensors")
        mark = common.fingerprint(common.open_checkpoint(c.laq, "laq", ("quantize",))[0])
        answers, kept = data.load_labels(path, dataset, both)
        marks["latents"] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        if kept["laq"] != mark:
            common.fail(
                f"{path}: made by LAQ {kept['laq']}, --laq {c.laq} is {mark}: label again "
                "with quantize.py label"
            )
    else:
        if c.labels == "action":
            actions = [e.actions for e in both]
        else:
            few_data = data.open_dataset(
                c.labelled_data or c.data,
                c.image_size,
                c.labelled_where,
                official=c.vision_vocab > 0,
            )
            marks["labelled_data"] = few_data.fingerprint
            few = data.labelled_few(few_data.split(c.held_out)[0], c.labelled, c.seed)
            actions = invert(*train_inverse_dynamics(c, processes, few), both)
            known = [
                (g[: len(e.actions)], e.actions)
                for g, e in zip(actions[len(train_set) :], held_out)
                if e.actions is not None
            ]
            if known:
                r2 = data.r2(*(np.concatenate(rows) for rows in zip(*known)))
                processes.say(
                    "inverse dynamics R2 on held-out episodes:",
                    [r if r is None else round(r, 3) for r in r2],
                )
        targets = np.concatenate(actions[: len(train_set)])
        edges = data.fit_bins(targets, c.bins, c.binary if c.labels == "action" else "")
        if c.labels == "idm":  # guesses of a gripper scatter around its values: take the true ones
            few_actions = np.concatenate([e.actions for e in few])
            true_edges = data.fit_bins(few_actions, c.bins, c.binary)
            edges = [
                true if len(true) <= data.FEW + 1 else guessed
                for guessed, true in zip(edges, true_edges)
            ]
        processes.say(data.describe_bins(edges, targets))
        answers = [data.to_bins(a, edges) for a in actions]
        kept = {"bins": [list(e) for e in edges]}
    return answers[: len(train_set)], answers[len(train_set) :], kept, marks


# ------------------------------------------------------------------------ training
def build_model(c, kind, dataset, processes):
    """A fresh VLA, or --init_from's -> model, tokenizer, names of fresh tensors"""
    if c.init_from:
        weights, meta = common.load_checkpoint(c.init_from, "init_from", ("pretrain",))
        tokenizer, shape = sequences.read_tokenizer(c.init_from), meta["model"]
    else:
        tokenizer = sequences.dataset_tokenizer(dataset)
        shape = {f.name: getattr(c, f.name) for f in fields(VLAConfig)}
        shape["text_vocab"] = tokenizer.get_vocab_size()
    shape |= {"latent_vocab": c.latent_vocab, "action_vocab": c.bins if kind == ACTION else 0}
    torch.manual_seed(c.seed)
    with common.refuse(f"--init_from {c.init_from}" if c.init_from else "network"):
        model = build_vla(VLAConfig(**shape))
        processes.shard(model, c, model.layers)
        if not c.init_from:
            return model, tokenizer, []
        fresh = model.load_pretrained(weights)
        if c.like_tag:
            model.start_from_tags(weights, fresh, sequences.opening_tags(tokenizer))
    processes.say(
        f"inherited {c.init_from} (step {meta['step']}); fresh: {', '.join(fresh) or 'nothing'}"
    )
    return model, tokenizer, fresh


@torch.no_grad()
def validate(model, c, kind, rows, lengths, processes, soft):
    """Loss and accuracy on 256 frames of the held-out episodes, the same ones every time"""
    which = data.draw(0, 0, 256, lengths)
    with processes.autocast(c):
        results = [
            loss_of(model, rows(which[at : at + c.batch]), kind, soft)
            for at in range(0, len(which), c.batch)
        ]
    loss, right = (float(sum(values) / len(values)) for values in zip(*results))
    return {"val_loss": loss, "val_accuracy": right}


def settle_options(c, given):
    """Refuse options that do not fit together; take the network's shape from --init_from"""
    if c.labels not in KINDS:
        common.fail(f"--labels {c.labels!r}: expected one of {', '.join(KINDS)}")
    if c.labels == "latent" and not c.laq:
        common.fail("--labels latent needs --laq, the quantize run that made them")
    for name in sorted(given & {"text_vocab", "latent_vocab", "action_vocab"}):
        common.fail(f"--{name}: follows from the tokenizer, the labels or --bins")
    if c.init_from:
        shape = common.open_checkpoint(c.init_from, "init_from", ("pretrain",))[1]["model"]
        for name in sorted(given & shape.keys()):
            if getattr(c, name) != shape[name]:
                common.fail(
                    f"--{name} {getattr(c, name)}: --init_from {c.init_from} has {shape[name]}"
                )
        c.__dict__.update(
            {name: shape[name] for name in ("image_size", "patch_size", "vision_vocab")}
        )


def train(c, given):
    settle_options(c, given)
    processes, kind = common.Processes(), KINDS[c.labels]
    common.refuse_busy(c.out)
    mine = processes.share(c)
    vqgan = data.open_vqgan(c.vqgan or c.init_from, "vqgan", processes.device, c.__dict__)
    dataset = data.open_dataset(
        c.data, c.image_size, c.where, c.labels == "action", official=vqgan is not None
    )
    train_set, held_out = dataset.split(c.held_out)
    if vqgan:  # augmented pictures are tokenised as they come, others once
        data.add_codes(dataset, held_out if c.shift else train_set + held_out, vqgan, processes)
    answers, held_answers, kept, marks = answers_for(c, processes, dataset, train_set, held_out)
    c.latent_vocab = kept.get("codebook_size", 0)
    model, tokenizer, fresh = build_model(c, kind, dataset, processes)
    rows_of = sequences.Sequences(
        tokenizer, model.config.image_tokens, c.template, c.length, c.official_cut
    )
    with common.refuse(c.data):
        rows_of.check(train_set + held_out, answers + held_answers, kind)
    run = common.Run(
        c,
        processes,
        "pretrain",
        model.config,
        dataset=dataset.fingerprint,
        laq=kept.get("laq"),
        window=kept.get("window"),
        **marks,
        vqgan=vqgan and vqgan.mark,
        init_from=common.fingerprint(c.init_from) if c.init_from else None,
    )
    groups = model.parameter_groups(c.lr, c.head_lr, fresh, c.freeze_vision and c.init_from)
    optimizer = common.make_optimizer(groups, betas=(0.9, 0.95), weight_decay=0.0)
    meta = {"labels": c.labels, "template": c.template, **kept}
    files = {"tokenizer.json": tokenizer.to_str()}
    if vqgan:
        meta["vqgan"], files["vqgan.safetensors"] = vqgan.config.__dict__, vqgan.file
    lengths, held_lengths = [len(a) for a in answers], [len(a) for a in held_answers]
    which = lambda step: data.draw(c.seed, step, c.batch, lengths)[mine]
    run.restore(
        model, optimizer, meta, files, lambda step: [train_set[e].id for e, _ in which(step)]
    )
    size = sum(p.numel() for p in model.parameters())
    processes.say(
        f"VLA of {size:,} parameters predicts {c.labels} on "
        f"{sum(lengths)} frames of {len(train_set)} episodes, {processes.device}"
    )

    soft = data.soft_widths(kept.get("bins", []), c.soft_bins)
    rows = lambda step: rows_of.batch(train_set, answers, kind, which(step), processes.device)
    held_rows = lambda which: rows_of.batch(held_out, held_answers, kind, which, processes.device)
    for step, batch in run.loop("rows", data.stream(rows, run.start, c.steps)):
        batch = sequences.augment(batch, c.shift * (kind != TEXT), vqgan, c.batch, mine)
        loss, right = processes.backward(
            model,
            c,
            lambda part: loss_of(model, part, kind, soft, c.official_text_mask),
            batch,
            run.culprits,
        )
        norm = common.optimizer_step(optimizer, processes, c, step)
        run.end_step(
            {"loss": loss, "accuracy": right, "grad_norm": norm},
            lambda: (
                validate(model, c, kind, held_rows, held_lengths, processes, soft)
                if held_out
                else {}
            ),
        )
    run.finish()


if __name__ == "__main__":
    train(*common.parse_options(PretrainConfig, sys.argv[1:], PRESETS))
