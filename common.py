"""What the stages share: command lines, processes, checkpoints, logs.  No stage or model."""

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import get_ident

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from model import full_tensor

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs none
warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # our blocks write into no view

MACHINE_FAULTS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # not of the file at hand


def print_anything():
    """Words that a terminal cannot show must not end a run: print their escapes"""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


print_anything()


def fail(message):
    """Refuse bad input: one clear line and exit code 2."""
    for bar in list(getattr(tqdm, "_instances", ())):  # else they are drawn anew below it
        bar.close()
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def refuse(what, kinds=(ValueError, OSError, TypeError)):
    """Inside it an error of these kinds becomes one line that begins with `what`"""
    try:
        yield
    except kinds as error:
        if isinstance(error, OSError) and error.errno in MACHINE_FAULTS:
            fail(f"{error.filename or what}: {error.strerror}")
        fail(f"{what}: {cause(error)}".partition("\n")[0])


def cause(error):
    """What an error says.  Of one that hides the operating system's (a full disk), what that says;
    of a checkpoint's, what the first process says that failed."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and re.match(r"\d+ requested and \d+ written", str(error)):
        return f"No space left on device ({error})"  # what numpy makes of it
    inner = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return error


def to_json(value, indent=None):
    """JSON of plain values; numbers that JSON does not have (NaN, infinity) become null"""

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def is_main_process():
    """Whether this is the only process, or the first of several that torchrun started"""
    return int(os.environ.get("RANK", 0)) == 0


# ------------------------------------------------------------------------ command line
def option_help(cls):
    """Field name -> its help: from the field's metadata, else the comment after it in the source"""
    source = "".join(inspect.getsource(base) for base in reversed(cls.__mro__[:-1]))
    comments = dict(re.findall(r"^    (\w+): [^#\n]*(?:# *(.*))?$", source, re.MULTILINE))
    return comments | {
        field.name: field.metadata["help"]
        for field in dataclasses.fields(cls)
        if "help" in field.metadata
    }


def parse_value(kind, least, text):
    """One option's text as bool, str, float, or int from `least` on"""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        value = words[text.lower()] if kind is bool else kind(text)
        if kind in (int, float) and not least <= value < 2**63:
            raise ValueError
        return value
    except (ValueError, KeyError):
        expected = {
            bool: "true or false",
            int: f"a whole number, {least} or more",
            float: "a number, 0 or more",
        }[kind]
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}") from None


def parse_options(cls, argv, presets=None, positional=()):
    """Command line -> dataclass `cls`, and the set of options that were named on it.

    `presets` is a table of named sizes, chosen by the field `preset`: named options beat the
    preset, which beats the defaults.  Fields in `positional` stand without their name.  A whole
    number may be 0 where that is its default or its comment tells what 0 means."""
    presets, comments = presets or {}, option_help(cls)
    shown = "\n".join(
        f"preset {name}: " + " ".join(f"--{k} {v}" for k, v in values.items())
        for name, values in presets.items()
    )
    before = sys.argv[1 : len(sys.argv) - len(argv)]  # a word that chose this command
    parser = argparse.ArgumentParser(
        usage=" ".join(["%(prog)s", *before, *positional, "[options]"]),
        epilog=shown,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: fail(message.removeprefix("argument "))
    for field in dataclasses.fields(cls):
        name, comment = field.name, comments.get(field.name, "")
        default = "required" if field.default is dataclasses.MISSING else repr(field.default)
        zero = field.type is float or field.default == 0 or name == "seed" or "0: " in comment
        least = field.metadata.get("least")
        if least is None:
            least = 0 if zero else 1
        plain, several = name in positional, field.type is list
        parser.add_argument(
            name if plain else f"--{name}",
            metavar=name if plain else "",
            nargs="+" if several else None,
            help=f"{default} {comment}".replace("%", "%%"),
            type=partial(parse_value, str if several else field.type, least),
        )
    given, stray = parser.parse_known_args(argv)
    if stray:
        fail(f"{stray[0]!r}: no such option (see --help)")
    given = vars(given)
    chosen = given.get("preset", getattr(cls, "preset", None))
    if presets and chosen not in presets:
        fail(f"--preset {chosen!r}: expected one of {', '.join(presets)}")
    for name in (f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING):
        if name not in given:
            fail(f"--{name} is required: {comments.get(name, '')}")
    return cls(**{**presets.get(chosen, {}), **given}), set(given)


def matching(rows, where, index, problems=()):
    """The rows that fulfil `where`: "name=value,name=value", values compared as JSON (true, null, 5
    equals 5.0) or, where they are no JSON, as text.  Refuses a condition that no row fulfils."""
    part = r'([^,="]+)=("(?:[^"\\]|\\.)*"|.+?)(?:,(?=[^,="]+=)|$)'  # name=value or name="JSON text"
    if where and not re.fullmatch(f"(?:{part})+", where):
        fail(f"--where {where!r}: expected name=value, comma separated")
    conditions = re.findall(part, where)
    kept = [
        row
        for row in rows
        if all(name in row and same_value(row[name], text) for name, text in conditions)
    ]
    if not kept and not problems:
        unknown = [name for name, _ in conditions if not any(name in row for row in rows)]
        fail(
            f"{index}: no episode"
            + (f" with {where}" if where else "")
            + (f" (none has a field {unknown[0]!r})" if rows and unknown else "")
        )
    return kept


def same_value(value, text):
    """Whether a JSON value is what the text says: numbers by value, True as true"""
    try:
        wanted = json.loads(text)
    except ValueError:
        wanted = text
    if type(value) in (int, float) and type(wanted) in (int, float):
        return value == wanted
    if type(value) is type(wanted) and value == wanted:
        return True
    return str(value) == text


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """The options that every training stage has."""

    data: str  # dataset folder
    out: str  # run folder
    preset: str = "lapa"  # named size or recipe: tiny, base or lapa (the paper's)
    where: str = ""  # keep episodes with these fields, e.g. embodiment=human,task=push
    held_out: int = 50  # episodes not trained on, unless they carry a `split`; 0: none
    steps: int
    batch: int  # samples a step, over all processes
    lr: float  # peak learning rate
    warmup: int = 0  # steps of linear warm-up
    final_lr: float = 1.0  # cosine down to this share of lr (official 1: constant)
    clip: float = 1.0  # gradient norm
    seed: int = 0
    log_every: int = 50  # steps
    save_every: int = 1000  # steps between checkpoints; 0: only the last
    keep: int = 1  # checkpoints that stay, the newest
    resume: bool = False  # continue from the latest checkpoint in --out
    accumulate: int = 1  # parts that a step's batch is cut into, to save memory
    bf16: bool = False  # bfloat16 arithmetic (autocast); optimizer and checkpoints stay in float32
    checkpointing: bool = False  # recompute a block's activations backward, to save memory
    compile: bool = False  # torch.compile each block


MAY_CHANGE = {f.name for f in dataclasses.fields(TrainConfig)} - {  # in a run that is resumed
    "where",
    "held_out",
    "batch",
    "seed",
}
# Files and folders are compared by what they hold (see Run, identity), not by how they are spelled.
PATH_OPTIONS = {"laq", "latents", "init_from", "vqgan", "labelled_data"}


# ------------------------------------------------------------------------ processes
class Processes:
    """This process among its peers: rank, world size, device.  Under torchrun, gloo or nccl."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device, gpu = torch.device("cpu"), torch.cuda.is_available()
        if gpu:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = True
        else:  # keep freed memory: fresh pages cost a seventh of a large model's step
            for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
                getattr(ctypes.CDLL(None), "mallopt", max)(option, value)  # glibc has it
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(minutes=10))
        self.main = self.rank == 0

    def share(self, c):
        """This rank's part of a global batch; refuses a --batch that does not divide"""
        if c.batch % (self.world * c.accumulate):
            fail(f"--batch {c.batch}: no multiple of {self.world} processes x --accumulate")
        return slice(self.rank * c.batch // self.world, (self.rank + 1) * c.batch // self.world)

    def say(self, *words):
        if self.main:
            tqdm.write(" ".join(map(str, words)))

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def close(self):
        """Leave the peers, and let gloo's threads drop their last tensors: at exit that aborts"""
        if self.world > 1:
            dist.destroy_process_group()
            time.sleep(0.5)

    def shard(self, model, c, blocks, whole=()):
        """Put a model on this process's device.  Among several processes each of its `blocks`, and
        what is left, are sharded (FSDP2; on GPUs c.bf16 gathers them in bfloat16), but for the
        parameters `whole`.  A model on the meta device begins with its init_weights."""
        if c.compile:
            check_compiler(self.device, "--compile")
        for block in blocks:
            if c.checkpointing:
                block.forward = partial(
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )  # no block draws numbers
            if c.compile:
                block.compile()
        meta = next(model.parameters()).is_meta
        if not meta:
            model.to(self.device)
        if self.world > 1:
            half = torch.bfloat16 if c.bf16 and self.device.type == "cuda" else None
            policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
            for part in (*blocks, model):
                fully_shard(part, mp_policy=policy, ignored_params=set(whole))
        if meta:
            model.to_empty(device=self.device)
            model.apply(model.init_weights)

    def autocast(self, c):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=c.bf16)

    def backward(self, model, c, loss_of, batch, who=str):
        """Backward passes over the parts of a batch (dict of tensors or None), gradients reduced
        with the last.  loss_of(part) -> loss and more tensors; returns these, of the whole batch:
        scalars averaged, others joined.  Refuses a loss that is not finite, and says whose."""
        results = []
        for i in range(c.accumulate):
            if self.world > 1:
                model.set_requires_gradient_sync(i + 1 == c.accumulate)
            part = {name: x if x is None else x.chunk(c.accumulate)[i] for name, x in batch.items()}
            with self.autocast(c):
                loss, *more = loss_of(part)
            if not math.isfinite(loss.item()):
                fail(f"the loss is {loss.item()}: {who()}")
            (loss / c.accumulate).backward()
            results.append((loss.detach(), *more))
        return [
            torch.cat(parts) if parts[0].dim() else torch.stack(parts).mean()
            for parts in zip(*results)
        ]

    def gather(self, tensor):
        """Every rank's part of a batch -> the whole of it, on every rank"""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def mean(self, values):
        """Dictionary of numbers -> their mean over ranks"""
        row = torch.tensor([list(values.values())], dtype=torch.float64, device=self.device)
        return dict(zip(values, self.gather(row).mean(0).tolist()))


def check_compiler(device, option):
    """Refuse torch.compile in one line where it does not work, for want of a C++ compiler, say"""

    def add_one(x):
        return x + 1

    try:
        torch.compile(add_one)(torch.zeros(2, device=device))
    except Exception as error:  # each backend has its own
        said = [line for line in str(error).splitlines() if line.strip()]
        fail(f"{option}: torch.compile does not work on this machine: {said[0] if said else error}")


def make_optimizer(groups, kind=torch.optim.AdamW, **settings):
    """Optimizer over groups [{"params": [...], "lr": ..}]; each parameter lands in exactly one."""
    groups = [
        {**g, "peak": g["lr"], "params": [p for p in g["params"] if p.requires_grad]}
        for g in groups
    ]
    return kind([g for g in groups if g["params"]], fused=True, **settings)


def optimizer_step(optimizer, processes, c, step):
    """Average over ranks what FSDP has not, clip the norm of gradients at c.clip, step at the rate
    that c.steps, c.warmup and c.final_lr give this step.  -> norm before clipping (float)"""
    params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    shards = [p.grad.to_local() for p in params if isinstance(p.grad, DTensor)]
    grads = [p.grad for p in params if not isinstance(p.grad, DTensor)]
    if processes.world > 1:
        for grad in grads:
            dist.all_reduce(grad)
            grad /= processes.world
    norm = torch.nn.utils.get_total_norm(grads)
    if shards:
        square = torch.nn.utils.get_total_norm(shards) ** 2
        dist.all_reduce(square)
        norm = torch.hypot(norm, square.sqrt())
    torch._foreach_mul_(grads + shards, (c.clip / (norm + 1e-6)).clamp(max=1))
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


def seed_step(seed, step):
    """Seed torch, so that noise is a function of (seed, step) and resuming needs no state"""
    digest = hashlib.sha256(f"{seed} {step} 0".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "little"))


# ------------------------------------------------------------------------ files
@contextlib.contextmanager
def atomically(path, tag=None, durable=False):
    """Yield the path of a draft (file or folder) that appears as `path` once whole, or never.

    tag: part of the draft's name; durable: on disk before it appears, even if the power fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.{tag or f'{os.getpid()}.{get_ident()}'}{path.suffix}")
    try:
        yield draft
        if durable:
            os.sync()
        os.replace(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # of a folder
        with contextlib.suppress(OSError):
            draft.unlink()


def write_atomically(path, text, durable=False):
    with refuse(f"{path}: not written"), atomically(path, durable=durable) as draft:
        draft.write_text(text, encoding="utf-8")


def save_weights(folder, tensors, shard=2 << 30):
    """Write (name, tensor) pairs to folder/model.safetensors or, where they take more than `shard`
    bytes, to numbered files with an index (Hugging Face's layout).  Holds one shard in memory."""
    parts, held = [], {}  # parts: the names in each file

    def write():
        save_file(held, folder / f"part{len(parts)}")
        parts.append(list(held))
        held.clear()

    for name, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > shard:
            write()
        held[name] = tensor
    if held:
        write()
    final = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": sum(p.stat().st_size for p in folder.glob("part*"))},
            "weight_map": {name: final[i] for i, part in enumerate(parts) for name in part},
        }
        (folder / "model.safetensors.index.json").write_text(to_json(index, 1), encoding="utf-8")
    for i, name in enumerate(final if len(parts) > 1 else ["model.safetensors"][: len(parts)]):
        os.replace(folder / f"part{i}", folder / name)


def weight_files(folder):
    """The safetensors files of a checkpoint's folder, one or several"""
    index, names = Path(folder) / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [Path(folder) / name for name in names]


def write_checkpoint(folder, tensors, meta, files):
    """Make a folder of weights ((name, tensor) pairs), config.json (meta) and files: name -> text,
    a Path to link or copy, or more weights"""
    folder.mkdir()
    save_weights(folder, tensors)
    for name, content in files.items():
        if isinstance(content, str):
            (folder / name).write_text(content, encoding="utf-8")
        elif isinstance(content, Path):
            try:
                os.link(os.path.realpath(content), folder / name)
            except OSError:
                shutil.copyfile(content, folder / name)
        else:
            save_file({n: tensor.contiguous() for n, tensor in content}, folder / name)
    (folder / "config.json").write_text(to_json(meta, 1), encoding="utf-8")


def latest(path):
    """A run's folder -> its newest checkpoint's; any other path as it is"""
    path = Path(path)
    mark = path / "latest"
    return path / mark.read_text(encoding="utf-8").strip() if mark.is_file() else path


def open_checkpoint(path, option, stages):
    """A run's folder or a checkpoint's own -> the checkpoint's, and meta (config.json).  Refuses,
    naming the option that asked for it, when there is none, and those of other stages."""
    path = latest(path)
    if not (path / "config.json").is_file() or not all(f.is_file() for f in weight_files(path)):
        fail(f"--{option} {path}: no checkpoint there (expected config.json and model.safetensors)")
    with refuse(f"--{option} {path}: unreadable checkpoint"):
        meta = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(meta, dict) or not {"stage", "model", "step"} <= meta.keys():
            raise ValueError("config.json lacks stage, model or step")
    if meta["stage"] not in stages:
        fail(f"--{option} {path}: holds stage {meta['stage']!r}, expected {' or '.join(stages)}")
    return path, meta


def load_checkpoint(path, option, stages):
    """-> weights (name -> safetensors slice, read when indexed), meta.  Refuses as above."""
    path, meta = open_checkpoint(path, option, stages)
    with refuse(f"--{option} {path}: unreadable checkpoint", (OSError, SafetensorError)):
        files = [safe_open(file, "pt") for file in weight_files(path)]
        return {name: file.get_slice(name) for file in files for name in file.keys()}, meta


def fingerprint(path):
    """12 hex digits that name the weights of a run's newest checkpoint"""
    digest = hashlib.sha256()
    for name in weight_files(latest(path)):
        with open(name, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:12]


def lock(file):
    """Whether this process may write to an open file: no other one has locked it.  The lock is
    given back when the process ends or closes any handle of that file."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # some file systems have no locks
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def refuse_busy(out):
    """Before hours of other work: refuse a run folder that another run writes into"""
    log = Path(out) / "metrics.jsonl"
    if is_main_process() and log.is_file():
        with refuse(f"--out {out}"), open(log, "a", encoding="utf-8") as file:
            if not lock(file):
                fail(f"--out {out}: another run is writing into this folder")


class Run:
    """The output folder of a stage: metrics.jsonl, a progress bar, checkpoints, resuming (for which
    `shape`, the network's config, `identity`, marks of files, and options must agree).  Order of
    calls: restore, loop (over batches from `start` on; after each step: end_step), finish."""

    def __init__(self, config, processes, stage, shape, **identity):
        self.c, self.out, self.processes, self.stage = config, Path(config.out), processes, stage
        self.meta = {
            "stage": stage,
            "model": shape.__dict__,
            "identity": identity,
            "options": config.__dict__,
        }
        self.start, self.found, self.numbers, self.signals = 0, None, {}, []
        free = 1.0
        if processes.main:
            with refuse(f"--out {self.out}"):
                self.out.mkdir(parents=True, exist_ok=True)
                self.log = open(self.out / "metrics.jsonl", "a+", encoding="utf-8")
            free = float(lock(self.log))
        if processes.mean({"free": free})["free"] < 1:
            if processes.main:
                fail(f"--out {self.out}: another run is writing into this folder")
            raise SystemExit(2)
        if (self.out / "latest").is_file():
            self.found, self.found_meta = open_checkpoint(self.out, "out", (stage,))
            self.start = self.found_meta["step"]
            if not config.resume:
                fail(
                    f"--out {self.out} already holds a checkpoint of step {self.start}: pass "
                    "--resume true to continue it, or another --out"
                )
            self.refuse_another_run(self.found_meta)
            if self.start > config.steps:
                fail(f"--steps {config.steps}: --out {self.out} has done {self.start} already")
        processes.barrier()
        if processes.main:
            self.forget_unsaved_steps()
        self.began = time.time()

    def refuse_another_run(self, theirs):
        """What is continued has to be the same run: same network, data, files and options"""
        pairs = [(self.meta["identity"], theirs["identity"])]
        pairs.append(
            [
                {
                    key: value
                    for key, value in (meta["options"] | meta["model"]).items()
                    if key not in MAY_CHANGE | PATH_OPTIONS
                }
                for meta in (self.meta, theirs)
            ]
        )
        for ours, found in pairs:
            for key in sorted(ours.keys() & found.keys()):
                if ours[key] != found[key]:
                    fail(
                        f"--out {self.out} was made with {key} = {found[key]}, this run has "
                        f"{ours[key]}: remove it or pass another --out"
                    )

    def forget_unsaved_steps(self):
        """Drop the log's rows after the checkpoint that is continued, and a torn last line"""
        self.log.seek(0)
        kept = []
        for line in self.log.read().splitlines() if self.start else []:
            if line.endswith("}") and json.loads(line)["step"] <= self.start:
                kept.append(line + "\n")
        with refuse(f"{self.log.name}: not written"):
            self.log.truncate(0)
            self.log.writelines(kept)
            self.log.flush()

    def restore(self, model, optimizer, meta, files, ids, export=None):
        """Train this model, from a checkpoint found on.  ids(step): what this process reads then;
        export() -> (name, tensor) of its weights for others, where these are not just its own"""
        self.model, self.optimizer, self.ids = model, optimizer, ids
        self.export = export or (
            lambda: ((name, full_tensor(tensor)) for name, tensor in model.state_dict().items())
        )
        self.meta, self.files = self.meta | meta, files
        if self.found:
            if self.found_meta.get("bins") != self.meta.get("bins"):
                fail(
                    f"--out {self.out} was made with other action bins than these options give: "
                    "pass another --out"
                )
            state = self.state()
            groups = state["optimizer"].pop("param_groups")  # rates and such are this run's own
            with refuse(
                f"--out {self.found}: cannot be continued", (Exception, CheckpointException)
            ):
                for part in state:  # what never had a gradient has no optimizer state
                    dcp.load(
                        {part: state[part]},
                        checkpoint_id=self.found / "training",
                        planner=DefaultLoadPlanner(allow_partial_load=part == "optimizer"),
                    )
                model.load_state_dict(state["model"])
                state["optimizer"]["param_groups"] = groups
                state_dict.set_optimizer_state_dict(model, optimizer, state["optimizer"])
            self.processes.say(f"resuming {self.out} at step {self.start}")

    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": state_dict.get_optimizer_state_dict(self.model, self.optimizer),
        }

    def loop(self, unit, batches):
        """Yield (step, batch) for the steps that are left, torch seeded by the step, behind a
        progress bar that counts `unit` a second.  SIGTERM and Ctrl-C end it behind a step."""

        def caught(number, _):
            self.signals.append(number)
            signal.signal(number, before[number])  # a second one ends it at once

        before = {kind: signal.signal(kind, caught) for kind in (signal.SIGTERM, signal.SIGINT)}
        self.bar = tqdm(
            range(self.start, self.c.steps),
            self.stage,
            self.c.steps,
            initial=self.start,
            mininterval=1.0,
            disable=not self.processes.main,
        )
        self.unit, self.mark = unit, (time.time(), self.start)
        try:
            for self.step, batch in zip(self.bar, batches):
                seed_step(self.c.seed, self.step)
                yield self.step, batch
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def culprits(self):
        ids = ", ".join(sorted(set(self.ids(self.step))))
        return f"step {self.step}, episodes {ids}; last good checkpoint: {self.found or 'none'}"

    def end_step(self, numbers, more=dict):
        """Every log_every steps: log the mean of all processes' numbers and of those that more()
        returns.  Every save_every steps: a checkpoint.  Both at the end, too."""
        c, step = self.c, self.step + 1
        if step % c.log_every == 0 or step == c.steps:
            numbers = {name: float(x) for name, x in {**numbers, **more()}.items()}
            self.numbers = self.processes.mean(numbers)
            if self.processes.world > 1:
                self.model.reshard()  # what a forward pass without a backward one has joined
            if self.processes.main:
                self.log_row(step, time.time())
        stop = self.processes.mean({"stop": float(bool(self.signals))})["stop"]
        if stop or step == c.steps or (c.save_every and step % c.save_every == 0):
            self.save(step)
        if stop:
            self.processes.say(f"stopped by a signal behind step {step}; --resume true goes on")
            raise SystemExit(128 + max(self.signals, default=signal.SIGTERM))

    def save(self, step):
        """Every process: write OUT/step_00000123 whole or not at all, point OUT/latest at it"""
        final, main = self.out / f"step_{step:08d}", self.processes.main
        if main:
            for old in (final, *self.out.glob(".step_*")):  # left by a killed process
                shutil.rmtree(old, ignore_errors=True)
        weights = self.export()
        place = (
            atomically(final, "draft", durable=True)
            if main
            else contextlib.nullcontext(self.out / f".{final.name}.draft")
        )
        with (
            refuse(
                f"{final}: not written, {self.found or 'nothing'} is the last checkpoint",
                (OSError, RuntimeError, SafetensorError, CheckpointException),
            ),
            place as draft,
        ):
            if main:
                write_checkpoint(draft, weights, {**self.meta, "step": step}, self.files)
            for _ in weights:  # nothing is left for the main process, others take part
                pass
            dcp.save(self.state(), checkpoint_id=draft / "training")
        if main:
            write_atomically(self.out / "latest", final.name + "\n", durable=True)
            for old in sorted(self.out.glob("step_*"))[: -self.c.keep]:
                shutil.rmtree(old)
        self.found = final
        self.processes.barrier()

    def log_row(self, step, now):
        rate = round(self.c.batch * (step - self.mark[1]) / max(now - self.mark[0], 1e-9), 1)
        self.mark = now, step
        self.bar.set_postfix({**self.numbers, f"{self.unit}/s": rate}, refresh=False)
        row = {
            "step": step,
            **self.numbers,
            f"{self.unit}_per_s": rate,
            "seconds": round(now - self.began, 1),
        }
        with refuse(f"{self.log.name}: not written"):
            self.log.write(to_json(row) + "\n")
            self.log.flush()

    def finish(self, summary=None, files=()):
        """Write summary.json (default: the last numbers), the mark of a finished stage"""
        if self.processes.main:
            summary = {"seconds": round(time.time() - self.began, 1), **(summary or self.numbers)}
            write_atomically(self.out / "summary.json", to_json(summary, 1) + "\n")
            self.log.close()
            files = [f"{latest(self.out)}/", *files, self.out / "summary.json"]
            print("wrote", ", ".join(map(str, files)))
        self.processes.close()
