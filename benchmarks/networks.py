"""Rows of the networks: training and labeling of the LAQ, training and actions of the VLA."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

import data
import finetune
import quantize
import training
from benchmarks.measure import (
    PRODUCTS,
    bandwidth,
    precision,
    print_row,
    print_step_row,
    processes,
    seconds,
    time_outside,
)
from benchmarks.memory import block_cost, finetuning_memory
from model import ACTION, LAQ, TEXT, VISION, VLA, LAQConfig, VLAConfig

OURS = {  # a VLA that reads pixels
    "vision_vocab": 0,
    "text_vocab": 512,
    "latent_vocab": 0,
    "action_vocab": 256,
    "rope_theta": 1e4,
}
SHAPES = {
    "tiny": {"dim": 128, "layers": 4, "heads": 4, "mlp": 344, "image_size": 64, **OURS},
    "200m": {"dim": 1024, "layers": 16, "heads": 16, "mlp": 2752, "image_size": 128, **OURS},
    "1b": {"dim": 2048, "layers": 16, "heads": 16, "mlp": 5504, "image_size": 128, **OURS},
    "7b": {"latent_vocab": 0, "action_vocab": 256},  # LAPA's, which reads codes
}
OPTIONS = {  # of a training step
    "tiny": {"batch": 64},
    "200m": {"batch": 8, "bf16": True},
    "1b": {"batch": 2, "bf16": True, "checkpointing": True},
    "7b": {"batch": 32, "bf16": True, "checkpointing": True},
}
LENGTHS = {"tiny": 42, "200m": 96, "1b": 96, "7b": 384}  # tokens of a row
ANSWER = 8  # tokens of an action and its end


def training_step(
    model: LAQ | VLA,
    c: quantize.QuantizeConfig | finetune.FinetuneConfig,
    batch: Tensor | dict[str, Tensor | None],
) -> Callable[[], object]:
    """Place a model on this process's device as its stage does -> one optimization step on a batch:
    pairs [B, 2, 3, H, W] for a LAQ, rows (see Sequences.batch) for a VLA"""
    if isinstance(model, LAQ):
        training.place(
            model, c, processes(), model.all_layers, unsharded=[model.quantizer.codebook]
        )
        optimizer = quantize.make_optimizer(model, c.lr, c.codebook_lr)
        return lambda: train_laq(model, optimizer, c, batch)

    training.place(model, c, processes(), model.layers)
    optimizer = training.make_optimizer(model.parameter_groups(1e-4, 1.0, ()))
    return lambda: train_vla(model, optimizer, c, batch)


def train_laq(model: LAQ, optimizer: Optimizer, c: quantize.QuantizeConfig, pairs: Tensor) -> None:
    """The body of the loop in quantize.py, for its second step"""
    noise = torch.randn(c.batch, c.code_len, c.quant_dim).to(pairs.device)
    shift = quantize.shift_at(1, c.shift, c.shift_from, c.shift_until)
    shifted = data.random_shift(pairs, shift) if shift else None
    batch = {"pair": pairs, "shifted": shifted, "noise": noise}
    for part in processes().micro_batches(model, batch):
        with torch.autocast(processes().device.type, torch.bfloat16, enabled=c.bf16):
            loss, d, indices = model(**part)
        loss.item()  # the loop checks that it is finite
        (loss / c.accumulate).backward()
    update(optimizer, c)
    quantize.update_codebook(model, d.detach(), indices, c, 1, processes())


def train_vla(
    model: VLA, optimizer: Optimizer, c: finetune.FinetuneConfig, rows: dict[str, Tensor | None]
) -> None:
    """The body of the loop in finetune.py"""
    for part in processes().micro_batches(model, rows):
        with torch.autocast(processes().device.type, torch.bfloat16, enabled=c.bf16):
            loss, _ = finetune.loss_of(model, part, 0.0)
        loss.item()  # the loop checks that it is finite
        (loss / c.accumulate).backward()
    update(optimizer, c)


def update(optimizer: Optimizer, c: quantize.QuantizeConfig | finetune.FinetuneConfig) -> None:
    """What both loops do after the backward pass"""
    training.set_learning_rate(optimizer, c, 1)
    processes().clip_gradients(optimizer)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------ stage 1
def laq(preset: str, batch: int, compiled: bool = False, profiled: bool = False) -> None:
    """A training step, where its time goes (profiled), and labeling"""
    c = quantize.QuantizeConfig(data="", out="", compile=compiled, **quantize.PRESETS[preset])
    c.batch = batch
    torch.manual_seed(0)
    model = LAQ(LAQConfig(**{name: getattr(c, name) for name in LAQConfig.__dataclass_fields__}))
    pairs = torch.rand(batch, 2, 3, c.image_size, c.image_size, device=processes().device)
    train = training_step(model, c, pairs)
    name = f"LAQ {preset} training{', compiled' if compiled else ''}, {batch} pairs"
    flops = 0 if compiled else None  # the counter sees no compiled products
    print_step_row(name, batch, "pairs", c.bf16, train, flops)
    if profiled:
        print_time_outside(train, compiled)
    # Around all batches, as in quantize.py: weights are cast once.
    with torch.autocast(processes().device.type, torch.bfloat16, enabled=c.bf16):
        name = f"LAQ {preset} labeling, {batch} pairs"
        print_step_row(name, batch, "pairs", c.bf16, lambda: model.label(pairs))


def print_time_outside(train: Callable[[], object], compiled: bool) -> None:
    """Rows of time_outside; modules are not told apart once compiled"""
    outside_modules, outside_names = time_outside(train)
    if not compiled:
        name = "outside matmuls, attention modules, convolutions"
        print_row(name, share=f"{outside_modules:.0%} of the time")
    name = f"outside operations named {', '.join(PRODUCTS)}"
    print_row(name, share=f"{outside_names:.0%} of the time")


# ------------------------------------------------------------------------ stages 2 and 3
def vla(name: str, lora_rank: int = 0, compiled: bool = False) -> None:
    """A training step, then the latency of an action"""
    c = finetune.FinetuneConfig(data="", out="", init_from="", lora_rank=lora_rank, **OPTIONS[name])
    torch.manual_seed(0)
    with torch.device("meta"):
        model = VLA(VLAConfig(**SHAPES[name]))
    if lora_rank:
        finetune.add_low_rank(model, lora_rank, torch.bfloat16)
    rows = random_rows(model.config, c.batch, LENGTHS[name])
    train = training_step(model, c, rows)
    if lora_rank:
        fill_frozen(model)
    print_vla_training(
        f"VLA {name}" + f" LoRA {lora_rank}" * bool(lora_rank), model, c, rows, train
    )

    model.zero_grad(set_to_none=True)
    model = (model.to(torch.bfloat16) if c.bf16 else model).eval()
    for count in (1, 64) if name == "tiny" else (1,):
        print_action(f"VLA {name}", model, prompt_of(rows, count), c.bf16)
    if compiled:
        model.compile_decode()
        print_action(f"VLA {name} compiled", model, prompt_of(rows, 1), c.bf16)


def random_rows(config: VLAConfig, batch: int, length: int) -> dict[str, Tensor | None]:
    """Rows of 8 words, a picture, words and an action, as Sequences.batch gives them"""
    device = processes().device
    kinds = torch.full((batch, length), TEXT, device=device)  # B, L
    kinds[:, 8 : 8 + config.image_tokens] = VISION
    kinds[:, -ANSWER:] = ACTION
    tokens = torch.randint(0, 250, kinds.shape, device=device)  # B, L
    pixels = (batch, 3, config.image_size, config.image_size)
    return {
        "tokens": tokens,
        "kinds": kinds,
        "targets": tokens,
        "target_kinds": kinds,
        "mask": kinds == ACTION,
        "images": None if config.vision_vocab else torch.rand(pixels, device=device),
    }


def fill_frozen(model: VLA) -> None:
    """Random numbers for the frozen weights of LoRA, in place of a checkpoint's"""
    for p in model.parameters():
        if p.dtype == torch.bfloat16:
            torch.nn.init.normal_(p, std=0.02)


def print_vla_training(
    name: str,
    model: VLA,
    c: finetune.FinetuneConfig,
    rows: dict[str, Tensor | None],
    train: Callable[[], object],
) -> None:
    """The row of a training step and, for larger models, the memory computed for it"""
    batch, length = rows["tokens"].shape
    flops = 3 * batch * model.config.layers * block_cost(model.config, length)[0]
    name = f"{name} training, {batch} rows of {length} tokens"
    name += ", checkpointing" if c.checkpointing else ""
    print_step_row(name, batch * length, "tokens", c.bf16, train, flops)
    if c.bf16:
        needs = finetuning_memory(model.config, batch, length, 1, c.checkpointing, c.lora_rank)
        print_row("its memory, computed", memory=sum(needs.values()))


def prompt_of(rows: dict[str, Tensor | None], count: int) -> tuple:
    """The first `count` rows without their action: the first arguments of VLA.generate"""
    tokens = rows["tokens"][:count, :-ANSWER]
    kinds = rows["kinds"][:count, :-ANSWER]
    images = None if rows["images"] is None else rows["images"][:count]
    return tokens, kinds, images, torch.ones_like(tokens, dtype=torch.bool), ACTION


def print_action(name: str, model: VLA, prompt: tuple, bf16: bool) -> None:
    """The row of the latency of 7 action tokens after a prompt (see VLA.generate)"""
    with torch.inference_mode():
        first, _ = seconds(lambda: model.generate(*prompt, 1), 1.0)
        fastest, times = seconds(lambda: model.generate(*prompt, 7), 3.0, most=200)
    token = (fastest - first) / 6
    read = sum(p.nbytes for p in model.layers.parameters())
    batch, length = prompt[0].shape
    print_row(
        f"{name} action, batch {batch}, prompt of {length}, {precision(bf16)}",
        f"p50 {1000 * np.median(times):.1f}, p95 {1000 * np.quantile(times, 0.95):.1f} ms",
        f"prefill {1000 * first:.1f}, token {1000 * token:.2f} ms",
        f"{read / token / bandwidth():.0%} of bandwidth",
    )
