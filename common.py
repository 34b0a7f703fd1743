"""What the stages share: command lines, processes, checkpoints, logs.  No stage or model."""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
import typing
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm


def fail(message):
    """Refuse bad input: one clear line and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def refuse(what, kinds=(ValueError, OSError)):
    """Inside it an error of these kinds becomes one line that begins with `what`"""
    try:
        yield
    except kinds as error:
        fail(f"{what}: {error}")


# ------------------------------------------------------------------------ command line

def option_help(cls):
    """Field name -> the comment that stands behind it in the dataclass's source"""
    source = "".join(inspect.getsource(base) for base in reversed(cls.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): [^#\n]*(?:# *(.*))?$", source, re.MULTILINE))


def parse_value(name, text, kind, least=0):
    """One option's text as bool, int, float or str; refuses by name."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True,
                    "false": False, "0": False, "no": False}[text.lower()]
        value = int(text.replace("_", "")) if kind is int else kind(text)
        if kind is not str and not (least if kind is int else 0) <= value < 2**63:
            raise ValueError
        return value
    except (ValueError, KeyError):
        expected = {bool: "true or false", int: f"a whole number, {least} or more",
                    float: "a number, 0 or more"}[kind]
        fail(f"--{name} {text!r}: expected {expected}")


def parse_options(cls, argv, presets=None, usage="", positional=()):
    """Command line -> dataclass `cls`, and the set of options that were named on it.

    Options are written `--name value` or `--name=value`.  `presets` is a table of named sizes,
    chosen by the field `preset`: named options beat the preset, which beats the defaults.
    `positional` names those that may stand without their name, in order.  A whole number may be 0
    where that is its default or its comment tells what 0 means."""
    presets, positional = presets or {}, list(positional)
    kinds, comments = typing.get_type_hints(cls), option_help(cls)
    known = {f.name: f.default for f in dataclasses.fields(cls)}
    if "-h" in argv or "--help" in argv:
        print(f"usage: {usage}\n")
        for name, default in known.items():
            shown = "required" if default is dataclasses.MISSING else repr(default)
            print(f"  --{name:<16} {shown:<14} {comments.get(name, '')}".rstrip())
        for name, values in presets.items():
            print(f"\npreset {name}: " + " ".join(f"--{k} {v}" for k, v in values.items()))
        raise SystemExit(0)
    given, rest = {}, list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if not positional:
                fail(f"unexpected argument {word!r}: options are written --name value")
            word = f"--{positional.pop(0)}={word}"
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in known:
            fail(f"unknown option --{name}; known: {', '.join(known)}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                fail(f"--{name} needs a value")
            text = rest.pop(0)
        zero = known[name] == 0 or name == "seed" or "0: " in comments.get(name, "")
        given[name] = parse_value(name, text, kinds[name], least=0 if zero else 1)
    chosen = given.get("preset", known.get("preset"))
    if presets and chosen not in presets:
        fail(f"--preset {chosen!r}: expected one of {', '.join(presets)}")
    for name, default in known.items():
        if default is dataclasses.MISSING and name not in given:
            fail(f"--{name} is required: {comments.get(name, '')}")
    return cls(**{**presets.get(chosen, {}), **given}), set(given)


# ------------------------------------------------------------------------ processes

class Processes:
    """This process among its peers: rank, world size, device.  Under torchrun, gloo or nccl."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        gpu = torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = True
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if gpu else "gloo")
        self.main = self.rank == 0

    def share(self, batch):
        """This rank's part of a global batch size; refuses one that does not divide"""
        if batch < 1 or batch % self.world:
            fail(f"--batch {batch} does not divide over {self.world} processes")
        return slice(self.rank * batch // self.world, (self.rank + 1) * batch // self.world)

    def say(self, *words):
        if self.main:
            tqdm.write(" ".join(str(w) for w in words))

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def shard(self, model):
        """Put a model on this process's device, equal on every rank.  Every parameter is whole on
        each rank here; sharding over ranks belongs in this one place."""
        model.to(self.device)
        if self.world > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)
        return model

    def mean(self, values):
        """Dictionary of numbers -> their mean over ranks"""
        if self.world == 1:
            return values
        packed = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(packed)
        return dict(zip(values, (packed / self.world).tolist()))


def make_optimizer(groups, kind=torch.optim.AdamW, **settings):
    """Optimizer over groups [{"params": [...], "lr": ..}]; each parameter lands in exactly one."""
    groups = [{**g, "peak": g["lr"], "params": [p for p in g["params"] if p.requires_grad]}
              for g in groups]
    return kind([g for g in groups if g["params"]], **settings)


def optimizer_step(optimizer, processes, c, step):
    """Average gradients over ranks, clip their norm at c.clip, step at the rate that c.steps,
    c.warmup and c.final_lr give this step.  -> gradient norm before clipping (float)"""
    params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    if processes.world > 1:
        flat = torch.cat([p.grad.flatten() for p in params]) / processes.world
        dist.all_reduce(flat)
        for p, part in zip(params, flat.split([p.numel() for p in params])):
            p.grad.copy_(part.view_as(p))
    norm = torch.nn.utils.clip_grad_norm_(params, c.clip)
    for g in optimizer.param_groups:
        g["lr"] = g["peak"] * warmup_cosine(step, c.steps, c.warmup, c.final_lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def warmup_cosine(step, steps, warmup, floor):
    """Learning-rate factor: linear over `warmup` steps, then a cosine from 1 down to `floor`"""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


def seed_step(seed, step, rank=0):
    """Seed torch, so that noise is a function of (seed, step, rank) and resuming needs no state"""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "little"))


# ------------------------------------------------------------------------ files

def write_atomically(path, text):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    os.replace(draft, path)


def save_checkpoint(out, step, weights, meta, texts=None, state=None):
    """Write OUT/step_00000123 whole or not at all, point OUT/latest at it, drop earlier ones.

    weights: name -> tensor, as model.safetensors; meta: dict, as config.json (step is added);
    texts: file name -> text, e.g. the tokenizer; state: for resuming alone, as training.pt."""
    out = Path(out)
    final, draft = out / f"step_{step:08d}", out / f".draft.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()},
              draft / "model.safetensors")
    for name, text in (texts or {}).items():
        (draft / name).write_text(text)
    if state is not None:
        torch.save(state, draft / "training.pt")
    (draft / "config.json").write_text(json.dumps({**meta, "step": step}, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(draft, final)
    write_atomically(out / "latest", final.name + "\n")
    for old in out.glob("step_*"):
        if old != final:
            shutil.rmtree(old)
    return final


def find_checkpoint(path, option):
    """A run's folder or a checkpoint's own -> the checkpoint's.  Refuses, naming the option that
    asked for it, when there is none."""
    path = Path(path)
    if (path / "latest").is_file():
        path = path / (path / "latest").read_text().strip()
    if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
        fail(f"--{option} {path}: no checkpoint there (expected config.json and model.safetensors)")
    return path


def read_meta(path, option, stages):
    """config.json of a checkpoint.  Refuses unreadable ones and those of other stages."""
    path = find_checkpoint(path, option)
    with refuse(f"--{option} {path}: unreadable checkpoint"):
        meta = json.loads((path / "config.json").read_text())
        if not isinstance(meta, dict) or not {"stage", "model", "step"} <= meta.keys():
            raise ValueError("config.json lacks stage, model or step")
    if meta["stage"] not in stages:
        fail(f"--{option} {path}: holds stage {meta['stage']!r}, expected {' or '.join(stages)}")
    return meta


def load_checkpoint(path, option, stages):
    """-> weights (name -> tensor), meta (config.json).  Refuses as read_meta does."""
    meta, path = read_meta(path, option, stages), find_checkpoint(path, option)
    with refuse(f"--{option} {path}: unreadable checkpoint", (OSError, SafetensorError)):
        return load_file(path / "model.safetensors"), meta


def fingerprint(path):
    """12 hex digits that name a checkpoint's weights"""
    digest = hashlib.sha256()
    with open(Path(path) / "model.safetensors", "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()[:12]


class Run:
    """The output folder of a stage: metrics.jsonl, a progress bar, checkpoints, resuming.

    run = Run(config, processes, "quantize"); run.start is the step to begin at.  `identity` is
    compared on resuming: a checkpoint trained on something else is refused."""

    def __init__(self, config, processes, stage, identity):
        self.out, self.processes, self.steps = Path(config.out), processes, config.steps
        self.save_every, self.stage, self.identity = config.save_every, stage, identity
        self.start, self.state, self.found = 0, None, None
        if (self.out / "latest").is_file():
            self.found = self.out / (self.out / "latest").read_text().strip()
            weights, meta = load_checkpoint(self.found, "out", (stage,))
            if not config.resume:
                fail(f"--out {self.out} already holds a checkpoint of step {meta['step']}: pass "
                     "--resume true to continue it, or another --out")
            for key, mine in identity.items():
                if (theirs := meta.get("identity", {}).get(key)) != mine:
                    fail(f"--out {self.out} was made with {key} = {theirs}, this run has {mine}: "
                         "remove it or pass another --out")
            self.start, self.weights = meta["step"], weights
            if self.start > self.steps:
                fail(f"--steps {self.steps}: --out {self.out} has done {self.start} already")
            with refuse(f"--out {self.found}: cannot be continued", Exception):
                self.state = torch.load(self.found / "training.pt", weights_only=True)
        processes.barrier()
        if processes.main:
            with refuse(f"--out {self.out}"):
                self.out.mkdir(parents=True, exist_ok=True)
            log = self.out / "metrics.jsonl"
            lines = log.read_text().splitlines() if log.is_file() and self.start else []
            done = lambda line: line.endswith("}") and json.loads(line)["step"] <= self.start
            log.write_text("".join(line + "\n" for line in filter(done, lines)))
            self.log = open(log, "a")
        self.began = time.time()

    def restore(self, model, optimizer):
        """Continue from the checkpoint found, if any"""
        if self.state is not None:
            model.load_state_dict(self.weights)
            optimizer.load_state_dict(self.state["optimizer"])
            self.weights = self.state = None
            self.processes.say(f"resuming {self.out} at step {self.start}")

    def loop(self, unit):
        """Yield the steps that are left, behind a progress bar that counts `unit` a second"""
        self.bar = tqdm(range(self.start, self.steps), initial=self.start, total=self.steps,
                        desc=self.stage, dynamic_ncols=True, mininterval=1.0,
                        disable=not self.processes.main)
        self.unit, self.mark = unit, (time.time(), self.start)
        yield from self.bar

    def record(self, step, size, **numbers):
        """Every process calls it with its own numbers; rank 0 writes their mean"""
        numbers = self.processes.mean({k: float(v) for k, v in numbers.items()})
        if not all(map(torch.isfinite, map(torch.tensor, numbers.values()))):
            fail(f"step {step}: {numbers} is not finite; last checkpoint: {self.found or 'none'}")
        if self.processes.main:
            now = time.time()
            rate = size * (step - self.mark[1]) / max(now - self.mark[0], 1e-9)
            self.mark = now, step
            self.bar.set_postfix({**{k: f"{v:.4g}" for k, v in numbers.items()},
                                  f"{self.unit}/s": f"{rate:.0f}"}, refresh=False)
            row = {"step": step, **numbers, f"{self.unit}_per_s": round(rate, 1),
                   "seconds": round(now - self.began, 1)}
            self.log.write(json.dumps(row) + "\n")
            self.log.flush()

    def save(self, step, model, optimizer, meta, texts=None):
        """Checkpoint when it is time: every save_every steps and at the end"""
        if not (step == self.steps or (self.save_every and step % self.save_every == 0)):
            return
        if self.processes.main:
            meta = {"stage": self.stage, "identity": self.identity, **meta}
            self.found = save_checkpoint(self.out, step, model.state_dict(), meta, texts,
                                         {"optimizer": optimizer.state_dict()})
        self.processes.barrier()

    def finish(self, summary, files):
        """Write summary.json, the mark of a finished stage, and name the files"""
        if self.processes.main:
            summary = {"seconds": round(time.time() - self.began, 1), **summary}
            write_atomically(self.out / "summary.json", json.dumps(summary, indent=1) + "\n")
            files = [f"{find_checkpoint(self.out, 'out')}/", *files, self.out / "summary.json"]
            print("wrote", ", ".join(str(f) for f in files))
        if self.processes.world > 1:
            dist.destroy_process_group()
