"""Speed and memory of the parts, one table: python -m tests.bench [cpu | compiled | gpu | memory].

Each row stands beside the matmul rate (of its precision) or the memory bandwidth, measured in the
same process, one of its own.  `memory` computes what finetuning a 7B takes, on any machine."""

import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import finetune
import quantize
from model import ACTION, LAQ, TEXT, VISION, VLA, Attention, LAQConfig, VLAConfig

PROCESSES = common.Processes()
DEVICE = PROCESSES.device
LINEAR = dict(vision_vocab=0, text_vocab=512, latent_vocab=0, action_vocab=256, rope_theta=1e4)
SIZES = {  # network, options of a step, tokens of a row
    "tiny": (
        dict(dim=128, layers=4, heads=4, mlp=344, image_size=64, **LINEAR),
        dict(batch=64),
        42,
    ),
    "200m": (
        dict(dim=1024, layers=16, heads=16, mlp=2752, image_size=128, **LINEAR),
        dict(batch=8, bf16=True),
        96,
    ),
    "1b": (
        dict(dim=2048, layers=16, heads=16, mlp=5504, image_size=128, **LINEAR),
        dict(batch=2, bf16=True, checkpointing=True),
        96,
    ),
    "7b": (
        dict(latent_vocab=0, action_vocab=256),
        dict(batch=32, bf16=True, checkpointing=True),
        384,
    ),
}
WORDS = "mm", "matmul", "conv", "softmax"  # in the names of operations


def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(work, budget, least=1, most=50):
    """Fastest of at least so many runs, as many as begin within the budget, and all of them; one
    goes before to warm up"""
    work()
    times, began = [], time.time()
    while len(times) < least or (time.time() - began < budget and len(times) < most):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times), times


def matmul_rate(bf16, size=2048):
    """Operations a second of a matrix product"""
    a = torch.rand(size, size, device=DEVICE).to(torch.bfloat16 if bf16 else torch.float32)
    return 2 * size**3 / seconds(lambda: a @ a, 0.5)[0]


def bandwidth():
    """Bytes a second that a matrix is read with, to be multiplied by a vector"""
    a = torch.rand(8192, 8192, device=DEVICE)
    return a.nbytes / seconds(lambda: torch.mv(a, a[0]), 0.5)[0]


def peak_memory():
    """Bytes that this process, or its GPU, has held at most"""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def row(name, rate, taken, share="", memory=None):
    print(
        f"| {name} | {rate} | {taken} | {share} | {(memory or peak_memory()) / 1e9:.1f} GB |",
        flush=True,
    )


def step_row(name, count, unit, bf16, work, flops=None):
    """One row for a step on `count` units; the faster of two measurements of the matmul rate"""
    flops, peak = counted(work) if flops is None else flops, matmul_rate(bf16)
    taken = seconds(work, 3.0, least=3)[0]
    row(
        f"{name}, {'bf16' if bf16 else 'fp32'}",
        f"{count / taken:,.1f} {unit}/s",
        f"{1000 * taken:,.1f} ms",
        f"{flops / taken / max(peak, matmul_rate(bf16)):.0%} of matmul" * bool(flops),
    )


def outside(work, runs=8):
    """Shares of the time (medians of some runs) spent outside matrix products, attention modules
    (LayerNorm, cosines, logits, softmax and all; not told apart once compiled) and convolutions,
    and outside operations that have one of WORDS in their name.  Backward passes count with what
    they belong to."""
    forward = Attention.forward

    def marked(self, *inputs, **named):
        with torch.profiler.record_function("attention module"):
            return forward(self, *inputs, **named)

    def among(event, test):
        while event is not None and not test(event.name, event.sequence_nr):
            event = event.cpu_parent
        return event is not None

    def shares():
        with torch.profiler.profile() as profiler:
            work()
        events, numbers = profiler.events(), {True: set(), False: set()}
        for event in events:  # backward operations carry the number of their forward one
            if not among(event, lambda name, _: name.startswith("autograd::engine")):
                attending = among(event, lambda name, _: name == "attention module")
                numbers[attending].add(event.sequence_nr)
        attention, spent = numbers[True] - numbers[False], np.zeros(3)
        for event in events:
            named = among(
                event,
                lambda name, _: name.startswith("aten::") and any(word in name for word in WORDS),
            )
            module = among(
                event,
                lambda name, number: (
                    name == "attention module"
                    or name.startswith("autograd::engine")
                    and number in attention
                ),
            )
            spent += np.array([not (named or module), not named, 1]) * event.self_cpu_time_total
        return spent[:2] / spent[2]

    Attention.forward = marked
    try:
        return np.median([shares() for _ in range(runs)], axis=0)
    finally:
        Attention.forward = forward


def counted(work):
    """Operations of matrix products; the counter takes grouped convolutions for dense ones"""
    with FlopCounterMode(display=False) as counter:
        work()
    table = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in table.items() if "conv" not in str(operation))


def laq(preset, batch, compiled=False, profiled=False):
    c = quantize.QuantizeConfig(data="", out="", compile=compiled, **quantize.PRESETS[preset])
    c.batch = batch
    torch.manual_seed(0)
    net = LAQ(LAQConfig(**{name: getattr(c, name) for name in LAQConfig.__dataclass_fields__}))
    PROCESSES.shard(net, c, net.blocks, whole=[net.quantizer.codebook])
    optimizer = quantize.make_optimizer(net, c)
    pairs = torch.rand(batch, 2, 3, c.image_size, c.image_size, device=DEVICE)
    train = lambda: quantize.train_step(net, optimizer, PROCESSES, c, 1, pairs)
    step_row(
        f"LAQ {preset} training{', compiled' * compiled}, {batch} pairs",
        batch,
        "pairs",
        c.bf16,
        train,
        0 if compiled else None,
    )  # the counter sees no compiled products
    if profiled:
        share, named = outside(train)
        if not compiled:
            row(
                "outside matmuls, attention modules, convolutions",
                "",
                "",
                f"{share:.0%} of the time",
            )
        row(f"outside operations named {', '.join(WORDS)}", "", "", f"{named:.0%} of the time")
    with PROCESSES.autocast(c):  # around all batches, as in quantize.py: weights are cast once
        step_row(
            f"LAQ {preset} labelling, {batch} pairs",
            batch,
            "pairs",
            c.bf16,
            lambda: net.label(pairs),
        )


def loader():
    with tempfile.TemporaryDirectory() as folder:
        rng, frames = np.random.default_rng(0), []
        for i in range(200):
            picture = Image.fromarray(rng.integers(0, 256, (45, 80, 3), np.uint8))
            picture.resize((320, 180), Image.BICUBIC).save(f"{folder}/{i}.jpg")
            frames.append(np.asarray(Image.open(f"{folder}/{i}.jpg").resize((256, 256))))
        np.save(f"{folder}/x.npy", np.stack(frames))
        Path(folder, "episodes.jsonl").write_text(
            '{"id": "a", "instruction": "push it", "video": "x.npy", "fps": 5}'
        )
        os.environ["LAPA_CACHE"] = f"{folder}/cache"
        (episode,) = data.open_dataset(folder, 256).episodes
        which = [(0, int(t)) for t in rng.integers(0, 190, 64)]
        jpeg = lambda t: np.asarray(
            Image.open(f"{folder}/{t}.jpg").convert("RGB").resize((256, 256), Image.BILINEAR)
        )
        peak = bandwidth()
        for name, work in (
            ("cache", lambda: data.frame_pairs([episode], which, 0.6)),
            (
                "two jpegs of 320x180 a pair",
                lambda: np.stack([(jpeg(t), jpeg(t + 3)) for _, t in which]),
            ),
        ):
            taken = seconds(work, 3.0)[0]
            row(
                f"64 pairs of 256x256 from {name}",
                f"{128 / taken:,.0f} frames/s",
                f"{1000 * taken:,.1f} ms",
                f"{128 * 3 * 256**2 / taken / peak:.1%} of bandwidth",
            )


def vla(name, lora_rank=0, compiled=False):
    """A training step, then the latency of an action"""
    shape, options, length = SIZES[name]
    c = finetune.FinetuneConfig(data="", out="", init_from="", lora_rank=lora_rank, **options)
    batch = c.batch
    torch.manual_seed(0)
    with torch.device("meta"):
        net = VLA(VLAConfig(**shape))
    if lora_rank:
        finetune.add_low_rank(net, lora_rank, torch.bfloat16)
    PROCESSES.shard(net, c, net.layers)
    for p in net.parameters():
        if lora_rank and p.dtype == torch.bfloat16:  # stands in for a checkpoint's weights
            torch.nn.init.normal_(p, std=0.02)
    size, image_tokens = net.config.image_size, net.config.image_tokens
    kinds = torch.full((batch, length), TEXT, device=DEVICE)
    kinds[:, 8 : 8 + image_tokens] = VISION
    kinds[:, -8:] = ACTION
    tokens = torch.randint(0, 250, kinds.shape, device=DEVICE)
    images = None if net.config.vision_vocab else torch.rand(batch, 3, size, size, device=DEVICE)
    rows = {
        "tokens": tokens,
        "kinds": kinds,
        "targets": tokens,
        "target_kinds": kinds,
        "mask": kinds == ACTION,
        "images": images,
    }
    vla_training(f"VLA {name}" + f" LoRA {lora_rank}" * bool(lora_rank), net, c, rows)
    net.zero_grad(set_to_none=True)
    net = (net.to(torch.bfloat16) if c.bf16 else net).eval()
    prompt = lambda rows: (
        tokens[:rows, :-8],
        kinds[:rows, :-8],
        None if images is None else images[:rows],
        torch.ones(rows, length - 8, dtype=torch.bool, device=DEVICE),
        ACTION,
    )
    for rows in (1, 64) if name == "tiny" else (1,):
        vla_action(f"VLA {name}", net, prompt(rows), c.bf16)
    if compiled:
        net.compile_decode()
        vla_action(f"VLA {name} compiled", net, prompt(1), c.bf16)


def vla_training(name, net, c, rows):
    groups = net.parameter_groups(1e-4, 1.0, (), False)
    optimizer = common.make_optimizer(groups)

    def train():
        PROCESSES.backward(net, c, lambda part: finetune.loss_of(net, part, 0.0), rows)
        common.optimizer_step(optimizer, PROCESSES, c, 1)

    batch, length = rows["tokens"].shape
    flops = 3 * batch * net.config.layers * block_cost(net.config, length)[0]
    step_row(
        f"{name} training, {batch} rows of {length} tokens" + ", checkpointing" * c.checkpointing,
        batch * length,
        "tokens",
        c.bf16,
        train,
        flops,
    )
    if c.bf16:
        computed = memory(net.config, batch, length, 1, c.checkpointing, c.lora_rank)
        row("its memory, computed", "", "", "", sum(computed.values()))


def vla_action(name, net, prompt, bf16):
    """The latency of 7 action tokens behind a prompt (see VLA.generate)"""
    with torch.inference_mode():
        first, _ = seconds(lambda: net.generate(*prompt, 1), 1.0)
        whole, times = seconds(lambda: net.generate(*prompt, 7), 3.0, most=200)
    token, read = (whole - first) / 6, sum(p.nbytes for p in net.layers.parameters())
    batch, length = prompt[0].shape
    row(
        f"{name} action, batch {batch}, prompt of {length}, {'bf16' if bf16 else 'fp32'}",
        f"p50 {1000 * np.median(times):.1f}, p95 {1000 * np.quantile(times, 0.95):.1f} ms",
        f"prefill {1000 * first:.1f}, a token {1000 * token:.2f} ms",
        f"{read / token / bandwidth():.0%} of bandwidth",
    )


# ---------------------------------------------------------------- memory, computed
def block_cost(config, length, lora_rank=0):
    """One row through one block in bf16, without doing it -> operations of its matrix products,
    bytes it keeps for the backward pass"""

    def kept(length):
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            net, sizes = VLA(replace(config, layers=1)), {}
            if lora_rank:
                finetune.add_low_rank(net, lora_rank, torch.bfloat16)

            def pack(tensor):
                storage = tensor.untyped_storage()
                sizes[storage._cdata] = storage.nbytes()
                return tensor

            x = torch.empty(1, length, config.dim, requires_grad=True)
            with (
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
                torch.autocast("cpu", torch.bfloat16),
            ):
                net.layers[0](x, *net.attention_inputs(x))
            return sum(sizes.values()), counter.get_total_flops()

    (once, flops), (twice, _) = kept(length), kept(2 * length)
    return flops, twice - once  # what a longer row does not change are weights


def memory(config, rows, length, gpus, checkpointing=False, lora_rank=0, accumulate=False):
    """Bytes that each GPU needs to finetune a VLA in bf16 on `rows` rows at once, by kind, when the
    fp32 weights, gradients and both moments of Adam are laid out as Processes.shard does it.
    accumulate: a step has several parts, so gradients lie there while the next part runs"""
    with torch.device("meta"):
        net = VLA(config)
    if lora_rank:
        finetune.add_low_rank(net, lora_rank, torch.bfloat16)
    learned = sum(p.numel() for p in net.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in net.parameters())
    block = sum(p.numel() for p in net.layers[0].parameters())
    root = sum(p.numel() for p in net.parameters()) - block * config.layers
    linear = sum(p.numel() for p in net.layers.parameters() if p.dtype == torch.float32)
    stream, kept = 4 * rows * length * config.dim, rows * block_cost(config, length, lora_rank)[1]
    activations = stream * config.layers + kept if checkpointing else kept * config.layers
    if gpus == 1:  # autocast's copies live through the forward pass, gradients come behind it
        copies, gradients = 2 * linear, 4 * learned
        behind = max(0, copies + activations - (0 if accumulate else gradients))
        return {
            "weights": weights,
            "optimizer": 8 * learned,
            "gradients": gradients,
            "activations and copies": behind,
        }
    gathered = 2 * (root + 2 * block) + 4 * min(learned, 2 * block)  # this block and the next
    gradients = 4 * learned * (accumulate + 1 / gpus)  # FSDP2 adds parts up before it shards them
    return {
        "weights": weights / gpus,
        "optimizer": 8 * learned / gpus,
        "gradients": gradients,
        "activations and copies": gathered + activations,
    }


def memory_table(rows=8, length=384):
    print(
        f"| GB a GPU, 7B, bf16, {rows} rows of {length} tokens a GPU | 1 GPU | 4 | 8 |\n"
        "|---|---|---|---|"
    )
    config = VLAConfig(latent_vocab=0, action_vocab=256)
    for name, *how in (
        ("full finetuning",),
        ("checkpointing", True),
        ("checkpointing, --accumulate", True, 0, True),
        ("LoRA 16", False, 16),
        ("LoRA 16, checkpointing", True, 16),
        ("LoRA 16, checkpointing, --accumulate", True, 16, True),
    ):
        cells = [memory(config, rows, length, n, *how) for n in (1, 4, 8)]
        print(
            f"| {name} | " + " | ".join(f"{sum(cell.values()) / 1e9:.0f}" for cell in cells) + " |"
        )


# ---------------------------------------------------------------- whole stages
def stages(steps=30):
    """The demo's stages as a user starts them: seconds of the whole process, start and data too"""
    with tempfile.TemporaryDirectory() as home:
        train = f"--preset tiny --steps {steps} --held_out 10 --out {home}"
        videos = f"--data {home}/table"
        for name, line in (
            ("150 episodes recorded", f"-m simulators.tabletop {home}/table --episodes 150"),
            (
                f"quantize, {steps} steps of 64 pairs, labels, report card",
                f"quantize.py {train}/laq {videos}",
            ),
            (
                f"pretrain, {steps} steps of 64 rows",
                f"pretrain.py {train}/pretrain {videos} --laq {home}/laq",
            ),
            (
                f"finetune, {steps} steps of 64 rows",
                f"finetune.py {train}/finetune {videos} --init_from {home}/pretrain",
            ),
            (
                "evaluate, 2 x 50 rollouts",
                f"evaluate.py --policies X={home}/finetune --episodes 50 --film 0 --out {home}/e",
            ),
        ):
            began = time.time()
            subprocess.run(
                [sys.executable, *line.split()],
                cwd=ROOT,
                check=True,
                capture_output=True,
                env={**os.environ, "LAPA_CACHE": f"{home}/cache"},
            )
            usage = resource.getrusage(resource.RUSAGE_CHILDREN)
            row(name, "", f"{time.time() - began:.1f} s", "", usage.ru_maxrss * 1024)


def main(what):
    if what == "memory":
        return memory_table()
    if what == "gpu" and DEVICE.type != "cuda":
        common.fail("no GPU here that torch can see")
    print(
        f"{DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}; matmul "
        f"{matmul_rate(False) / 1e9:,.0f} (fp32) and {matmul_rate(True) / 1e9:,.0f} (bf16) "
        f"GFLOP/s, memory {bandwidth() / 1e9:,.0f} GB/s"
    )
    print("| what | rate | a step | share of the machine's | peak memory |\n|---|---|---|---|---|")
    parts = [
        (laq, "tiny", 64),
        (laq, "base", 16),
        (laq, "lapa", 8),
        (loader,),
        (vla, "tiny"),
        (vla, "200m"),
        (vla, "1b"),
        (stages,),
    ]
    if what == "compiled":
        parts = [
            (laq, "tiny", 64, False, True),
            (laq, "tiny", 64, True, True),
            (vla, "tiny", 0, True),
        ]
    if what == "gpu":
        parts = [(laq, "lapa", 64), (vla, "1b", 0, True), (vla, "7b", 0, True), (vla, "7b", 16)]
    for work, *arguments in parts:
        child = torch.multiprocessing.get_context("spawn").Process(target=work, args=arguments)
        child.start()
        child.join()
        if child.exitcode:
            common.fail(f"{work.__name__} {arguments}: exit code {child.exitcode}")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["cpu"])
