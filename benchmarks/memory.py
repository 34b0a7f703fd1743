"""What finetuning a VLA needs in memory, computed without doing it, on any machine."""

from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import finetune
from model import VLA, VLAConfig


def block_cost(config: VLAConfig, length: int, lora_rank: int = 0) -> tuple[int, int]:
    """One row through one block in bf16, without doing it -> operations of its matrix products,
    bytes it keeps for the backward pass"""
    flops, once = cost_with_weights(config, length, lora_rank)
    _, twice = cost_with_weights(config, 2 * length, lora_rank)
    return flops, twice - once  # what a longer row does not change are weights


def cost_with_weights(config: VLAConfig, length: int, lora_rank: int) -> tuple[int, int]:
    """The same, but the bytes include weights that autocast has copied"""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        net = VLA(replace(config, layers=1))
        if lora_rank:
            finetune.add_low_rank(net, lora_rank, torch.bfloat16)
        sizes = {}  # storage -> its bytes: two tensors may share one

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
            return tensor

        x = torch.empty(1, length, config.dim, requires_grad=True)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            run_block(net, x)
        return counter.get_total_flops(), sum(sizes.values())


def run_block(net: VLA, x: Tensor) -> Tensor:
    """[B, L, D] through a VLA's first block, as its forward pass does it"""
    return net.layers[0](x, *net.attention_inputs(x))


def finetuning_memory(
    config: VLAConfig,
    rows: int,
    length: int,
    gpus: int,
    checkpointing: bool = False,
    lora_rank: int = 0,
    accumulate: bool = False,
) -> dict[str, float]:
    """Bytes that each GPU needs to finetune a VLA in bf16 on `rows` rows at once, by kind, when the
    fp32 weights, gradients and both moments of Adam are laid out as training.place does it.
    accumulate: a step has several parts, so gradients stay while the next part runs"""
    with torch.device("meta"):
        net = VLA(config)
    if lora_rank:
        finetune.add_low_rank(net, lora_rank, torch.bfloat16)
    learned = sum(p.numel() for p in net.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in net.parameters())
    block = sum(p.numel() for p in net.layers[0].parameters())
    root = sum(p.numel() for p in net.parameters()) - block * config.layers
    linear = sum(p.numel() for p in net.layers.parameters() if p.dtype == torch.float32)
    stream = 4 * rows * length * config.dim  # what goes from block to block
    kept = rows * block_cost(config, length, lora_rank)[1]
    activations = stream * config.layers + kept if checkpointing else kept * config.layers
    if gpus == 1:  # autocast's copies live through the forward pass, gradients come after it
        copies = 2 * linear
        gradients = 4 * learned
        beside = max(0, copies + activations - (0 if accumulate else gradients))
        return {
            "weights": weights,
            "optimizer": 8 * learned,
            "gradients": gradients,
            "activations and copies": beside,
        }
    gathered = 2 * (root + 2 * block) + 4 * min(learned, 2 * block)  # this block and the next
    gradients = 4 * learned * (accumulate + 1 / gpus)  # FSDP2 adds parts up before it shards them
    return {
        "weights": weights / gpus,
        "optimizer": 8 * learned / gpus,
        "gradients": gradients,
        "activations and copies": gathered + activations,
    }


WAYS = {  # to finetune the 7B
    "full finetuning": {},
    "checkpointing": {"checkpointing": True},
    "checkpointing, --accumulate": {"checkpointing": True, "accumulate": True},
    "LoRA 16": {"lora_rank": 16},
    "LoRA 16, checkpointing": {"lora_rank": 16, "checkpointing": True},
    "LoRA 16, checkpointing, --accumulate": {
        "lora_rank": 16,
        "checkpointing": True,
        "accumulate": True,
    },
}


def print_memory_table(rows: int = 8, length: int = 384) -> None:
    """GB per GPU for the 7B, on 1, 4 and 8 GPUs (docs/scaling.md)"""
    print(
        f"| GB per GPU, 7B, bf16, {rows} rows of {length} tokens per GPU | 1 GPU | 4 | 8 |\n"
        "|---|---|---|---|"
    )
    config = VLAConfig(latent_vocab=0, action_vocab=256)
    for name, way in WAYS.items():
        needs = [finetuning_memory(config, rows, length, gpus, **way) for gpus in (1, 4, 8)]
        cells = [f"{sum(need.values()) / 1e9:.0f}" for need in needs]
        print(f"| {name} | {' | '.join(cells)} |")
