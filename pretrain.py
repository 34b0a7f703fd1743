"""Stage 2, latent pretraining (paper 3.2): predict latent actions from image and instruction.

One loop serves every arm of the paper's comparison; they differ only in what they predict:
    --labels latent    LAPA: the codes that quantize.py wrote for each frame
    --labels action    ACTIONVLA: the true actions of all episodes (the upper bound)
    --labels idm       VPT: actions guessed by baselines/inverse_dynamics.py, from a labels file
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
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.optim import Optimizer

import common
import data
import sequences
import training
from common import option
from model import ACTION, LATENT, TEXT, VLA, VLAConfig, build_vla

KINDS = {"latent": LATENT, "action": ACTION, "idm": ACTION, "caption": TEXT}


@dataclass(kw_only=True)
class PretrainConfig(VLAConfig, training.TrainConfig):
    """The options of this stage, on top of the network's shape (which --init_from settles)"""

    labels: str = option("latent", "what to predict: latent, action, idm or caption")
    laq: str = option("", "quantize run whose latent actions are predicted")
    labels_file: str = option("", "latent, idm: labels file; empty: the one inside --laq")
    init_from: str = option("", "checkpoint to start from; empty: random weights")
    vqgan: str = option(
        "", "where the image tokenizer of a model with vision codes is; empty: --init_from"
    )
    freeze_vision: bool = option(True, "with --init_from, keep the patch embedding (paper 3.2)")
    template: str = option("{instruction}", "text around the instruction")
    length: int = option(
        0, "tokens a row is cut or padded to; 0: the longest of the batch (official 384)"
    )
    official_cut: bool = option(False, "cut rows have their loss mask off by one")
    official_text_mask: bool = option(
        False, "the text loss also trains latent positions, toward token 0"
    )
    shift: float = option(
        0.0, "latent and action labels: random shift of pictures, as a fraction of them"
    )
    like_tag: bool = option(
        False, "fresh input tables start out as the opening tag (official: random)"
    )
    steps: int = option(70_000, "optimization steps (paper, Open-X)")
    batch: int = option(128, "rows per step, over all processes (paper 128, code 256)")
    lr: float = option(2e-5, "AdamW 0.9/0.95, constant, no weight decay (code)")
    head_lr: float = option(1.0, "rate of a fresh head and its table, relative to lr")
    bins: int = option(256, "action labels: bins per dimension")
    soft_bins: float = option(
        0.0, "action labels: width, in bins, of a Gaussian around the true one"
    )
    binary: str = option("", "action labels: dimensions that mean 0 or 1 (grippers), e.g. 6")


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


def loss_of(
    model: VLA,
    rows: dict[str, Tensor],
    kind: int,
    soft: float | list[float] = 0.0,
    official_text_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    """Stage-2 loss (paper 3.2, code): 0.99 x cross entropy of the labels + 0.01 x that of the
    tags around them and eos; for captions, whose labels are text, plain cross entropy.

    rows: a batch as made by Sequences.batch.  -> loss, fraction of labels predicted exactly"""
    hidden = model(rows["tokens"], rows["kinds"], rows["images"])
    text_loss, text_accuracy = model.answer_loss(hidden, rows, TEXT)
    if kind == TEXT:
        return text_loss, text_accuracy
    if official_text_mask:
        text_loss, _ = model.answer_loss(hidden, misread_text_mask(rows), TEXT)
    # Neighboring bins are alike; neighboring codes are not.
    loss, accuracy = model.answer_loss(hidden, rows, kind, soft if kind == ACTION else 0.0)
    return 0.99 * loss + 0.01 * text_loss, accuracy


def misread_text_mask(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Officially a misplaced parenthesis, L * (1 - V * (1 - D)), makes latent positions text ones
    whose target is token 0"""
    latent = rows["target_kinds"] == LATENT
    return rows | {
        "targets": rows["targets"].where(~latent, 0),
        "target_kinds": rows["target_kinds"].where(~latent, TEXT),
    }


# ------------------------------------------------------------------------ labels
@dataclass
class Answers:
    """What the model must say at every frame.

    train, held_out: per episode [T, n] codes or bins, or T captions; notes: what checkpoints tell
    later stages; marks: hashes of the files they came from, which a resumed run compares"""

    train: list
    held_out: list
    notes: dict = field(default_factory=dict)
    marks: dict = field(default_factory=dict)


def read_answers(
    c: PretrainConfig,
    dataset: data.Dataset,
    train_set: list[data.Episode],
    held_out: list[data.Episode],
) -> Answers:
    """What --labels asks for, of the training and of the held-out episodes"""
    episodes = train_set + held_out
    notes, marks = {}, {}
    if c.labels == "caption":
        answers = read_captions(c.data, episodes)
    elif c.labels == "latent":
        answers, notes, marks = read_latent_actions(c, dataset, episodes)
    else:
        if c.labels == "action":
            actions = [episode.actions for episode in episodes]
        else:
            actions, marks = read_guessed_actions(c.labels_file, dataset, episodes)
        to_fit = np.concatenate(actions[: len(train_set)])
        edges = data.fit_bins(to_fit, c.bins, c.binary)
        if common.is_main_process():
            print(data.describe_bins(edges, to_fit))
        answers = [data.to_bins(rows, edges) for rows in actions]
        notes = {"bins": [list(e) for e in edges]}
    return Answers(answers[: len(train_set)], answers[len(train_set) :], notes, marks)


def read_captions(folder: str, episodes: list[data.Episode]) -> list[list[str]]:
    """Captions of every frame, which the dataset itself holds"""
    for episode in episodes:
        if not episode.info.get("captions"):
            common.fail(
                f"{folder}/episodes.jsonl: episode {episode.id!r}: field captions: missing, but "
                "--labels caption needs it"
            )
    return [episode.info["captions"] for episode in episodes]


def read_latent_actions(
    c: PretrainConfig, dataset: data.Dataset, episodes: list[data.Episode]
) -> tuple[list[np.ndarray], dict, dict]:
    """Codes int64 [T, K] of each episode, notes and marks.  Refuses the labels of another LAQ."""
    run = Path(c.laq)
    if not (run / "labels.safetensors").is_file() and common.latest(run.parent) == run:
        run = run.parent  # --laq names a checkpoint in a run
    path = Path(c.labels_file or run / "labels.safetensors")
    laq = common.fingerprint(common.open_checkpoint(c.laq, "laq", ("quantize",))[0])
    codes, meta = data.load_labels(path, dataset, episodes)
    if meta.get("laq") != laq:
        common.fail(
            f"{path}: made by LAQ {meta.get('laq')}, --laq {c.laq} is {laq}: label again with "
            "quantize.py label"
        )
    return codes, meta, {"labels_file": file_mark(path)}


def read_guessed_actions(
    path: str, dataset: data.Dataset, episodes: list[data.Episode]
) -> tuple[list[np.ndarray], dict]:
    """Guessed actions float32 [T, A] of each episode, and marks"""
    actions, _ = data.load_labels(path, dataset, episodes)
    if actions[0].dtype != np.float32:
        common.fail(
            f"--labels_file {path}: holds codes, expected actions (python -m "
            "baselines.inverse_dynamics)"
        )
    return actions, {"labels_file": file_mark(path)}


def file_mark(path: str | Path) -> str:
    """12 hex digits that name a file's content"""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


# ------------------------------------------------------------------------ model
def settle_options(c: PretrainConfig, named_options: set[str]) -> None:
    """Refuse options that do not fit together; take the network's shape from --init_from"""
    if c.labels not in KINDS:
        common.fail(f"--labels {c.labels!r}: expected one of {', '.join(KINDS)}")
    if c.labels == "latent" and not c.laq:
        common.fail("--labels latent needs --laq, the quantize run that made them")
    if c.labels == "idm" and not c.labels_file:
        common.fail("--labels idm needs --labels_file (python -m baselines.inverse_dynamics)")
    for name in sorted(named_options & {"text_vocab", "latent_vocab", "action_vocab"}):
        common.fail(f"--{name}: follows from the tokenizer, the labels or --bins")
    if not c.init_from:
        return
    shape = common.open_checkpoint(c.init_from, "init_from", ("pretrain",))[1]["model"]
    for name in sorted(named_options & shape.keys()):
        if getattr(c, name) != shape[name]:
            common.fail(f"--{name} {getattr(c, name)}: --init_from {c.init_from} has {shape[name]}")
    for name in ("image_size", "patch_size", "vision_vocab"):
        setattr(c, name, shape[name])


def load_model(
    c: PretrainConfig, latent_vocab: int, dataset: data.Dataset, processes: training.Processes
) -> tuple[VLA, Tokenizer, list[str]]:
    """A fresh VLA, or --init_from's -> the placed model, tokenizer, names of fresh tensors"""
    if c.init_from:
        weights, meta = common.load_checkpoint(c.init_from, "init_from", ("pretrain",))
        tokenizer = sequences.read_tokenizer(c.init_from)
        shape = meta["model"]
    else:
        tokenizer = sequences.dataset_tokenizer(dataset)
        shape = {field.name: getattr(c, field.name) for field in fields(VLAConfig)}
        shape["text_vocab"] = tokenizer.get_vocab_size()
    shape["latent_vocab"] = latent_vocab
    shape["action_vocab"] = c.bins if KINDS[c.labels] == ACTION else 0
    torch.manual_seed(c.seed)
    with common.refuse(f"--init_from {c.init_from}" if c.init_from else "network"):
        model = build_vla(VLAConfig(**shape))
        training.place(model, c, processes, model.layers)
        if not c.init_from:
            return model, tokenizer, []
        fresh = model.load_pretrained(weights)
        if c.like_tag:
            model.start_from_tags(weights, fresh, sequences.opening_tags(tokenizer))
    processes.say(
        f"inherited {c.init_from} (step {meta['step']}); fresh: {', '.join(fresh) or 'nothing'}"
    )
    return model, tokenizer, fresh


# ------------------------------------------------------------------------ training
def train(c: PretrainConfig, named_options: set[str]) -> None:
    """Learn to predict what --labels says.  named_options: those on the command line"""
    settle_options(c, named_options)
    processes = training.start_processes(c)
    kind = KINDS[c.labels]
    local_rows = processes.local_rows
    shift = 0.0 if kind == TEXT else c.shift  # captions say where things are
    dataset, train_set, held_out, vqgan = open_data(c, shift, processes)
    answers = read_answers(c, dataset, train_set, held_out)
    latent_vocab = answers.notes.get("codebook_size", 0)
    model, tokenizer, fresh = load_model(c, latent_vocab, dataset, processes)
    image_tokens = model.config.image_tokens
    row_builder = sequences.Sequences(tokenizer, image_tokens, c.template, c.length, c.official_cut)
    with common.refuse(c.data):
        row_builder.check(train_set + held_out, answers.train + answers.held_out, kind)
    frame_counts = [len(episode_answers) for episode_answers in answers.train]
    sampler = data.FrameSampler(train_set, frame_counts, c.seed, c.batch, local_rows)

    def load_rows(step: int) -> dict[str, Tensor | None]:
        return row_builder.batch(
            train_set, answers.train, kind, sampler.frames(step), processes.device
        )

    run = open_run(c, processes, model, dataset, answers, tokenizer, vqgan)
    optimizer = make_optimizer(model, c, fresh)
    run.resume(model, optimizer)
    processes.say(
        f"VLA: {sum(p.numel() for p in model.parameters()):,} parameters, {c.labels} labels "
        f"on {sum(frame_counts)} frames of {len(train_set)} episodes, {processes.device}"
    )
    soft = data.soft_widths(answers.notes.get("bins", []), c.soft_bins)

    batches = data.stream(load_rows, run.start, c.steps)
    for step, batch in run.steps(batches, "rows"):
        training.set_learning_rate(optimizer, c, step)
        batch = sequences.augment(batch, shift, vqgan, c.batch, local_rows)
        results = []
        for part in processes.micro_batches(model, batch):  # --accumulate
            with processes.autocast():  # --bf16
                loss, accuracy = loss_of(model, part, kind, soft, c.official_text_mask)
            run.refuse_not_finite("loss", loss, step, sampler)
            (loss / c.accumulate).backward()
            results.append((loss.detach(), accuracy))
        grad_norm = processes.clip_gradients(optimizer)  # --clip
        run.refuse_not_finite("gradient norm", grad_norm, step, sampler)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if run.log_due(step):
            loss, accuracy = (torch.stack(values).mean() for values in zip(*results, strict=True))
            numbers = {"loss": loss, "accuracy": accuracy, "grad_norm": grad_norm}
            if held_out:
                numbers |= validate(
                    model, c, row_builder, held_out, answers.held_out, soft, processes
                )
            run.log(step, numbers)
        if run.stop_requested() or run.save_due(step):
            run.save(step, model, optimizer)
    run.finish()


def open_data(
    c: PretrainConfig, shift: float, processes: training.Processes
) -> tuple[data.Dataset, list[data.Episode], list[data.Episode], data.ImageTokenizer | None]:
    """-> dataset, training and held-out episodes, and the image tokenizer (None for a model that
    reads linear patches)"""
    vqgan = data.open_vqgan(c.vqgan or c.init_from, "vqgan", processes.device, c.__dict__)
    actions_needed = c.labels == "action"
    for_vqgan = vqgan is not None
    dataset = data.open_dataset(c.data, c.image_size, c.where, actions_needed, for_vqgan)
    train_set, held_out = dataset.split(c.held_out)
    if vqgan:  # shifted pictures are tokenized as they come, others once
        from official.image_codes import add_codes

        once = held_out if shift else train_set + held_out
        add_codes(dataset, once, vqgan, processes)
    return dataset, train_set, held_out, vqgan


def make_optimizer(model: VLA, c: PretrainConfig, fresh: list[str]) -> Optimizer:
    """AdamW; fresh tensors learn at head_lr x lr; pretrained patch embeddings stay frozen"""
    if c.freeze_vision and c.init_from:
        model.freeze_vision()
    groups = model.parameter_groups(c.lr, c.head_lr, fresh)
    return training.make_optimizer(groups, betas=(0.9, 0.95), weight_decay=0.0)


def open_run(
    c: PretrainConfig,
    processes: training.Processes,
    model: VLA,
    dataset: data.Dataset,
    answers: Answers,
    tokenizer: Tokenizer,
    vqgan: data.ImageTokenizer | None,
) -> training.Run:
    """The run folder, with what a resumed run has to agree on and what later stages need"""
    identity = {
        "dataset": dataset.fingerprint,
        "laq": answers.notes.get("laq"),
        "window": answers.notes.get("window"),
        **answers.marks,
        "vqgan": vqgan and vqgan.mark,
        "init_from": common.fingerprint(c.init_from) if c.init_from else None,
    }
    notes = {"labels": c.labels, "template": c.template, **answers.notes}
    files = {"tokenizer.json": tokenizer.to_str()}
    if vqgan:
        notes["vqgan"] = vqgan.config.__dict__
        files["vqgan.safetensors"] = vqgan.file
    return training.Run(c, processes, "pretrain", model.config, identity, notes, files)


@torch.no_grad()
def validate(
    model: VLA,
    c: PretrainConfig,
    row_builder: sequences.Sequences,
    episodes: list[data.Episode],
    answers: list,
    soft: float | list[float],
    processes: training.Processes,
) -> dict[str, float]:
    """Loss and accuracy on 256 frames of the held-out episodes, the same ones every time"""
    kind = KINDS[c.labels]
    frames = data.draw(0, 0, 256, [len(answer) for answer in answers])
    losses, accuracies = [], []
    with processes.autocast():
        for at in range(0, len(frames), c.batch):
            part = frames[at : at + c.batch]
            rows = row_builder.batch(episodes, answers, kind, part, processes.device)
            loss, accuracy = loss_of(model, rows, kind, soft, c.official_text_mask)
            losses.append(loss * len(part))
            accuracies.append(accuracy * len(part))
    if processes.world > 1:
        model.reshard()  # what a forward pass without a backward one has gathered
    return {
        "val_loss": float(sum(losses) / len(frames)),
        "val_accuracy": float(sum(accuracies) / len(frames)),
    }


if __name__ == "__main__":
    train(*common.parse_options(PretrainConfig, sys.argv[1:], PRESETS))
