"""What the training loops of the three stages share: processes and sharding, the optimizer's step,
and the run folder with its log, its checkpoints and resuming.

A stage's loop is in the stage's own file.  It calls, in this order:

    processes = start_processes(options)   # one, or those of torchrun
    place(model, ...)                      # on the device, sharded over the processes
    run = Run(...)                         # the folder --out; refuses another run's
    optimizer = make_optimizer(...)
    run.resume(model, optimizer)           # from the newest checkpoint in --out, if there is one
    for step, batch in run.steps(...):     # progress bar, torch seeded by the step
        set_learning_rate(optimizer, ...)
        for part in processes.micro_batches(model, batch):
            with processes.autocast(): ...           # forward pass
            run.refuse_not_finite("loss", ...)
            loss.backward()
        processes.clip_gradients(optimizer)
        run.refuse_not_finite("gradient norm", ...)
        optimizer.step()
        if run.log_due(step): run.log(...)
        if run.stop_requested() or run.save_due(step): run.save(...)
    run.finish()

SIGTERM and Ctrl-C let the step end: stop_requested then says so on every process, the loop saves,
and run.steps ends the program."""

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common import (
    atomically,
    fail,
    latest,
    lock,
    open_checkpoint,
    option,
    refuse,
    refuse_busy,
    to_json,
    write_atomically,
    write_checkpoint,
)
from data import FrameSampler
from model import full_tensor

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process needs none
warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # our blocks write into no view


Batch = dict[str, Tensor | None]


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """The options that every training stage has"""

    data: str = option(help="dataset folder")
    out: str = option(help="run folder")
    preset: str = option("lapa", "named size or recipe: tiny, base or lapa (the paper's)")
    where: str = option("", "keep episodes with these fields, e.g. embodiment=human,task=push")
    held_out: int = option(50, "episodes held out, unless they have a `split`; 0: none", 0)
    steps: int = option(help="optimization steps")
    batch: int = option(help="samples per step, over all processes")
    lr: float = option(help="peak learning rate")
    warmup: int = option(0, "steps of linear warm-up")
    final_lr: float = option(1.0, "cosine down to this share of lr (official 1: constant)")
    clip: float = option(1.0, "largest gradient norm")
    seed: int = option(0, "of weights, batches and noise")
    log_every: int = option(50, "steps between rows of the log")
    save_every: int = option(1000, "steps between checkpoints; 0: only the last", 0)
    keep: int = option(1, "newest checkpoints to keep")
    resume: bool = option(False, "continue from the latest checkpoint in --out")
    accumulate: int = option(1, "parts a step's batch is split into, to save memory")
    bf16: bool = option(
        False, "bfloat16 arithmetic (autocast); optimizer and checkpoints stay in float32"
    )
    checkpointing: bool = option(
        False, "recompute a block's activations in the backward pass, to save memory"
    )
    compile: bool = option(False, "torch.compile each block")


# What may differ when a run is resumed.  Files and folders are compared by content (the
# run's `identity`), not by path.
MAY_CHANGE = {field.name for field in dataclasses.fields(TrainConfig)}
MAY_CHANGE -= {"where", "held_out", "batch", "seed"}
PATH_OPTIONS = {"laq", "labels_file", "init_from", "vqgan"}
RENAMED = {"latents": "labels_file"}  # marks of older runs: their name -> today's


# ------------------------------------------------------------------------ processes
@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among its peers, which torchrun started, or alone; and how a step is computed.

    rank: its number; world: how many there are; device: where its tensors live; local_rows: its
    rows of a global batch; accumulate, bf16, clip: see TrainConfig"""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    local_rows: slice = dataclasses.field(default_factory=lambda: slice(None))
    accumulate: int = 1
    bf16: bool = False
    clip: float = 1.0

    @property
    def main(self) -> bool:
        return self.rank == 0

    def say(self, *words: object) -> None:
        """Print from the main process, above its progress bar"""
        if self.main:
            tqdm.write(" ".join(map(str, words)))

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def gather(self, tensor: Tensor) -> Tensor:
        """Every process's rows of a batch -> all rows, on every process"""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Named numbers -> their mean over all processes"""
        row = torch.tensor([list(values.values())], dtype=torch.float64, device=self.device)
        return dict(zip(values, self.gather(row).mean(0).tolist(), strict=True))

    def autocast(self) -> torch.autocast:
        """bfloat16 arithmetic inside it, with --bf16"""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def micro_batches(self, model: nn.Module, batch: Batch) -> Iterator[Batch]:
        """Cut a step's batch into --accumulate parts.  Several processes exchange gradients with
        the last part only."""
        for i in range(self.accumulate):
            if self.world > 1:
                model.set_requires_gradient_sync(i + 1 == self.accumulate)
            yield {
                name: None if tensor is None else tensor.chunk(self.accumulate)[i]
                for name, tensor in batch.items()
            }

    def clip_gradients(self, optimizer: Optimizer) -> float:
        """Scale all gradients so that their norm is at most --clip -> the norm before.

        Gradients that FSDP has not averaged over the processes (of unsharded parameters) are
        averaged here; the norm is that of the whole model, not of this process's shards."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        params = [p for p in params if p.grad is not None]
        shards = [p.grad.to_local() for p in params if isinstance(p.grad, DTensor)]
        gradients = [p.grad for p in params if not isinstance(p.grad, DTensor)]
        if self.world > 1:
            for gradient in gradients:
                dist.all_reduce(gradient)
                gradient /= self.world
        norm = nn.utils.get_total_norm(gradients)
        if shards:
            square = nn.utils.get_total_norm(shards) ** 2
            dist.all_reduce(square)
            norm = torch.hypot(norm, square.sqrt())
        torch._foreach_mul_(gradients + shards, (self.clip / (norm + 1e-6)).clamp(max=1))
        return float(norm)

    def close(self) -> None:
        """Leave the peers"""
        if self.world > 1:
            dist.destroy_process_group()
            time.sleep(0.5)  # until gloo's threads drop their tensors: later, at exit, that aborts


def set_up_device() -> torch.device:
    """The GPU that torchrun gives this process, or the CPU, set up for speed"""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        return device
    # Keep freed memory: fresh pages cost a seventh of a large model's step.
    set_malloc_option = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if set_malloc_option:
        set_malloc_option(-4, 0)  # M_MMAP_MAX
        set_malloc_option(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return torch.device("cpu")


def start_processes(config: TrainConfig | None = None) -> Processes:
    """Join the other processes of torchrun (NCCL on GPUs, else gloo), or be the only one.

    Refuses a --batch that the processes cannot share, and a run folder that is in use."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = set_up_device()
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
    if config is None:
        return Processes(rank, world, device)
    refuse_busy(config.out)
    local_rows = share_of_batch(config.batch, rank, world, config.accumulate)
    return Processes(rank, world, device, local_rows, config.accumulate, config.bf16, config.clip)


def share_of_batch(batch: int, rank: int, world: int, accumulate: int) -> slice:
    """The rows of a global batch that one of `world` processes computes, in equal parts"""
    if batch % (world * accumulate):
        fail(f"--batch {batch}: not a multiple of {world} processes x --accumulate {accumulate}")
    return slice(rank * batch // world, (rank + 1) * batch // world)


# ------------------------------------------------------------------------ the model's place
def place(
    model: nn.Module,
    config: TrainConfig,
    processes: Processes,
    blocks: Iterable[nn.Module],
    unsharded: Iterable[nn.Parameter] = (),
) -> None:
    """Put a model on this process's device.

    With several processes, each of its `blocks` and the rest are sharded (FSDP2; on GPUs
    --bf16 gathers them in bfloat16), except for the parameters `unsharded`.  A model on the meta
    device gets memory and begins with its init_weights."""
    blocks = list(blocks)
    if config.checkpointing:
        recompute_activations(blocks)
    if config.compile:
        check_compiler(processes.device, "--compile")
        for block in blocks:
            block.compile()
    on_meta_device = next(model.parameters()).is_meta
    if not on_meta_device:
        model.to(processes.device)
    if processes.world > 1:
        on_gpu = processes.device.type == "cuda"
        gathered_dtype = torch.bfloat16 if config.bf16 and on_gpu else None
        policy = MixedPrecisionPolicy(gathered_dtype, torch.float32, cast_forward_inputs=False)
        for part in (*blocks, model):
            fully_shard(part, mp_policy=policy, ignored_params=set(unsharded))
    if on_meta_device:
        model.to_empty(device=processes.device)
        model.apply(model.init_weights)


def recompute_activations(blocks: Iterable[nn.Module]) -> None:
    """Activation checkpointing: the backward pass computes a block's activations anew"""
    for block in blocks:
        block.forward = partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=False,  # no block draws random numbers
        )


def check_compiler(device: torch.device, wanted_by: str) -> None:
    """Refuse torch.compile in one line where it does not work, for want of a C++ compiler, say"""

    def add_one(x: Tensor) -> Tensor:
        return x + 1

    try:
        torch.compile(add_one)(torch.zeros(2, device=device))
    except Exception as error:  # each backend has its own kinds
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else error
        fail(f"{wanted_by}: torch.compile does not work on this machine: {reason}")


# ------------------------------------------------------------------------ one optimization step
def make_optimizer(
    groups: list[dict], optimizer_class: type[Optimizer] = torch.optim.AdamW, **settings: object
) -> Optimizer:
    """Optimizer over groups [{"params": [...], "lr": peak rate}] of the parameters that learn"""
    learning = []
    for group in groups:
        params = [p for p in group["params"] if p.requires_grad]
        if params:
            learning.append({**group, "params": params, "peak": group["lr"]})
    return optimizer_class(learning, fused=True, **settings)


def set_learning_rate(optimizer: Optimizer, config: TrainConfig, step: int) -> None:
    """Every group's rate at this step: --warmup to its peak, then a cosine to --final_lr of it"""
    factor = warmup_cosine(step, config.steps, config.warmup, config.final_lr)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def warmup_cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Learning-rate factor: linear over `warmup` steps, then a cosine from 1 down to `floor`"""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def seed_step(seed: int, step: int) -> None:
    """Seed torch, so that noise is a function of (seed, step) and resuming needs no state"""
    digest = hashlib.sha256(f"{seed} {step} 0".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "little"))


# ------------------------------------------------------------------------ the run folder
class Run:
    """The folder of one run: metrics.jsonl, checkpoints, and resuming.

    config: the stage's options; shape: the network's config; identity: marks of the files that the
    run reads.  These have to agree when a run is resumed.  notes: what later stages need to know
    (config.json of each checkpoint holds it); files: what goes with the weights, name -> content
    (see common.write_checkpoint).

    start: the step to begin with, 0 for a new run; last_checkpoint: folder, None for a new run."""

    def __init__(
        self,
        config: TrainConfig,
        processes: Processes,
        stage: str,
        shape: object,
        identity: dict,
        notes: dict | None = None,
        files: dict | None = None,
    ) -> None:
        self.config = config
        self.processes = processes
        self.stage = stage
        self.out = Path(config.out)
        self.meta = {
            "stage": stage,
            "model": shape.__dict__,
            "identity": identity,
            "options": config.__dict__,
            **(notes or {}),
        }
        self.files = files or {}
        self.last_checkpoint: Path | None = None
        self.start = 0
        self.numbers: dict[str, float] = {}  # the last that were logged
        self.signals: list[int] = []  # SIGTERM or SIGINT, once received
        self.stopping = False  # whether all processes have agreed to stop
        self.claim_folder()
        self.find_checkpoint()
        processes.barrier()
        if processes.main:
            self.forget_unsaved_steps()
        self.began = time.time()

    # -------------------------------------------------------------- beginning
    def claim_folder(self) -> None:
        """Lock the log of the folder, so that no other run writes into it"""
        free = 1.0
        if self.processes.main:
            with refuse(f"--out {self.out}"):
                self.out.mkdir(parents=True, exist_ok=True)
                self.log_file = open(self.out / "metrics.jsonl", "a+", encoding="utf-8")  # noqa: SIM115
            free = float(lock(self.log_file))
        if self.processes.mean({"free": free})["free"] < 1:
            if self.processes.main:
                fail(f"--out {self.out}: another run is writing into this folder")
            raise SystemExit(2)

    def find_checkpoint(self) -> None:
        """See where the run stands; refuse to continue another one"""
        if not (self.out / "latest").is_file():
            return
        self.last_checkpoint, found = open_checkpoint(self.out, "out", (self.stage,))
        self.start = found["step"]
        if not self.config.resume:
            fail(
                f"--out {self.out} already holds a checkpoint of step {self.start}: pass "
                "--resume true to continue it, or another --out"
            )
        self.refuse_another_run(found)
        if self.start > self.config.steps:
            fail(
                f"--steps {self.config.steps}: --out {self.out} has already done {self.start} steps"
            )

    def refuse_another_run(self, found: dict) -> None:
        """A resumed run has to be the same run: same network, data, files, options and bins"""

        def fixed_options(meta: dict) -> dict:
            options = meta["options"] | meta["model"]
            return {k: v for k, v in options.items() if k not in MAY_CHANGE | PATH_OPTIONS}

        identity = {RENAMED.get(key, key): mark for key, mark in found["identity"].items()}
        for ours, theirs in (
            (self.meta["identity"], identity),
            (fixed_options(self.meta), fixed_options(found)),
        ):
            for key in sorted(ours.keys() & theirs.keys()):
                if ours[key] != theirs[key]:
                    fail(
                        f"--out {self.out} was made with {key} = {theirs[key]}, this run has "
                        f"{ours[key]}: remove it or pass another --out"
                    )
        if found.get("bins") != self.meta.get("bins"):
            fail(
                f"--out {self.out} was made with other action bins than these options give: "
                "pass another --out"
            )

    def forget_unsaved_steps(self) -> None:
        """Drop the log's rows after the checkpoint that is continued, and a torn last line"""
        self.log_file.seek(0)
        kept = []
        for line in self.log_file.read().splitlines() if self.start else []:
            if line.endswith("}") and json.loads(line)["step"] <= self.start:
                kept.append(line + "\n")
        with refuse(f"{self.log_file.name}: not written"):
            self.log_file.truncate(0)
            self.log_file.writelines(kept)
            self.log_file.flush()

    def resume(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Load the last checkpoint, if there is one, into a model and its optimizer"""
        if self.last_checkpoint is None:
            return
        folder = self.last_checkpoint / "training"
        state = training_state(model, optimizer)
        own_groups = state["optimizer"].pop("param_groups")  # rates and such stay this run's own
        errors = (Exception, CheckpointException)
        with refuse(f"--out {self.last_checkpoint}: cannot be continued", errors):
            # dcp.load fills the tensors of `state` in place.
            dcp.load({"model": state["model"]}, checkpoint_id=folder)
            dcp.load(
                {"optimizer": state["optimizer"]},
                checkpoint_id=folder,
                # A parameter that never had a gradient has no state in the file.
                planner=DefaultLoadPlanner(allow_partial_load=True),
            )
            model.load_state_dict(state["model"])
            state["optimizer"]["param_groups"] = own_groups
            state_dict.set_optimizer_state_dict(model, optimizer, state["optimizer"])
        self.processes.say(f"resuming {self.out} at step {self.start}")

    # -------------------------------------------------------------- the loop
    def steps(self, batches: Iterable, unit: str) -> Iterator[tuple[int, object]]:
        """Yield (step, batch) for the steps that are left, with torch seeded by the step, under a
        progress bar that counts `unit` per second.

        SIGTERM or Ctrl-C ends the program after a step (see stop_requested); a second one ends it
        at once."""

        def note_signal(number: int, _: FrameType | None) -> None:
            self.signals.append(number)
            signal.signal(number, previous[number])

        stop_signals = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.signal(number, note_signal) for number in stop_signals}
        self.bar = tqdm(
            range(self.start, self.config.steps),
            self.stage,
            self.config.steps,
            initial=self.start,
            mininterval=1.0,
            disable=not self.processes.main,
        )
        self.unit = unit
        self.last_logged = (time.time(), self.start)
        try:
            for step, batch in zip(self.bar, batches, strict=False):
                seed_step(self.config.seed, step)
                yield step, batch
                if self.stopping:
                    self.processes.say(
                        f"stopped by a signal after step {step + 1}; --resume true continues"
                    )
                    raise SystemExit(128 + max(self.signals, default=signal.SIGTERM))
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def is_due(self, step: int, every: int) -> bool:
        """Whether what happens every so many steps (0: never), and at the end, is due after this"""
        done = step + 1
        return done == self.config.steps or (every > 0 and done % every == 0)

    def log_due(self, step: int) -> bool:
        return self.is_due(step, self.config.log_every)

    def save_due(self, step: int) -> bool:
        return self.is_due(step, self.config.save_every)

    def stop_requested(self) -> bool:
        """Every process, once per step: whether one of them has received a signal.  The loop then
        saves, and `steps` ends the program."""
        signaled = float(bool(self.signals))
        self.stopping = self.processes.mean({"signaled": signaled})["signaled"] > 0
        return self.stopping

    def refuse_not_finite(
        self, what: str, value: float | Tensor, step: int, sampler: FrameSampler
    ) -> None:
        """Stop before a loss or gradient that is not finite can spoil the weights: name the
        episodes of this step and the last good checkpoint"""
        number = value.item() if isinstance(value, Tensor) else value
        if math.isfinite(number):
            return
        names = ", ".join(sorted(set(sampler.episode_ids(step))))
        fail(
            f"the {what} is {number}: step {step}, episodes {names}; last good checkpoint: "
            f"{self.last_checkpoint or 'none'}"
        )

    def log(self, step: int, numbers: dict[str, float | Tensor]) -> None:
        """Every process: add a row with the mean of all processes' numbers to metrics.jsonl"""
        plain = {name: float(value) for name, value in numbers.items()}
        self.numbers = self.processes.mean(plain)
        if not self.processes.main:
            return
        now, done = time.time(), step + 1
        then, logged = self.last_logged
        rate = round(self.config.batch * (done - logged) / max(now - then, 1e-9), 1)
        self.last_logged = (now, done)
        self.bar.set_postfix({**self.numbers, f"{self.unit}/s": rate}, refresh=False)
        row = {
            "step": done,
            **self.numbers,
            f"{self.unit}_per_s": rate,
            "seconds": round(now - self.began, 1),
        }
        with refuse(f"{self.log_file.name}: not written"):
            self.log_file.write(to_json(row) + "\n")
            self.log_file.flush()

    # -------------------------------------------------------------- checkpoints, the end
    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        weights: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
    ) -> None:
        """Every process: write OUT/step_00000123 whole or not at all, then point OUT/latest at it.

        weights() -> (name, tensor) pairs for other stages, where these are not the model's own"""
        done = step + 1
        final = self.out / f"step_{done:08d}"
        main = self.processes.main
        if main:
            for leftover in (final, *self.out.glob(".step_*")):  # of a killed process
                shutil.rmtree(leftover, ignore_errors=True)
        exported = weights() if weights else full_weights(model)
        if main:
            draft_folder = atomically(final, "draft", durable=True)
        else:
            draft_folder = contextlib.nullcontext(self.out / f".{final.name}.draft")
        errors = (OSError, RuntimeError, SafetensorError, CheckpointException)
        last_good = self.last_checkpoint or "nothing"
        with (
            refuse(f"{final}: not written, {last_good} is the last checkpoint", errors),
            draft_folder as draft,
        ):
            if main:
                write_checkpoint(draft, exported, {**self.meta, "step": done}, self.files)
            for _ in exported:  # the main process has them all; the others take part in gathering
                pass
            dcp.save(training_state(model, optimizer), checkpoint_id=draft / "training")
        if main:
            write_atomically(self.out / "latest", final.name + "\n", durable=True)
            for old in sorted(self.out.glob("step_*"))[: -self.config.keep]:
                shutil.rmtree(old)
        self.last_checkpoint = final
        self.processes.barrier()

    def finish(self, summary: dict | None = None, files: Iterable[Path] = ()) -> None:
        """Write summary.json (default: the last numbers), the mark of a finished stage"""
        if self.processes.main:
            seconds = round(time.time() - self.began, 1)
            path = self.out / "summary.json"
            text = to_json({"seconds": seconds, **(summary or self.numbers)}, 1)
            write_atomically(path, text + "\n")
            self.log_file.close()
            print("wrote", ", ".join(map(str, [f"{latest(self.out)}/", *files, path])))
        self.processes.close()


def training_state(model: nn.Module, optimizer: Optimizer) -> dict:
    """What resuming needs: each process's shards"""
    return {
        "model": model.state_dict(),
        "optimizer": state_dict.get_optimizer_state_dict(model, optimizer),
    }


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all weights, gathered one by one; every process takes part"""
    for name, tensor in model.state_dict().items():
        yield name, full_tensor(tensor)
