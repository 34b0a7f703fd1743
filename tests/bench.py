"""Speed of the parts, one table: python -m tests.bench, or make bench (under 5 minutes on 2 cores).

Each row stands beside the matmul rate of the same precision, measured in the same process."""

import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import pretrain
import quantize
from model import ACTION, LAQ, TEXT, VISION, VLA, LAQConfig, VLAConfig

PROCESSES = common.Processes()
DEVICE = PROCESSES.device

DTYPES = {False: torch.float32, True: torch.bfloat16}


def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()

def seconds(work, budget=6.0, most=50):
    """Fastest of the runs that fit into the budget, after one to warm up, and all of them"""
    times, began = [], time.time()
    work()
    while not times or (time.time() - began < budget and len(times) < most):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times), times

def matmul_rate(dtype, size=2048):
    a = torch.rand(size, size, device=DEVICE).to(dtype)
    return 2 * size**3 / seconds(lambda: a @ a, 1.0)[0]

def row(name, count, unit, time_taken, flops=0, rate=0):
    share = f"{flops / time_taken / rate:.0%}" if flops else ""
    print(f"| {name} | {count / time_taken:,.1f} {unit}/s | {1000 * time_taken:,.1f} ms | "
          f"{share} |", flush=True)

def counted(work):
    """Operations of matrix products; the counter takes grouped convolutions for dense ones"""
    with FlopCounterMode(display=False) as counter:
        work()
    table = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in table.items() if "conv" not in str(operation))

def laq(preset, batch, rates):
    c = quantize.QuantizeConfig(data="", out="", **quantize.PRESETS[preset])
    c.batch, c.bf16 = batch, c.bf16 or preset == "lapa"
    torch.manual_seed(0)
    net = LAQ(LAQConfig(**{name: getattr(c, name) for name in LAQConfig.__dataclass_fields__}))
    PROCESSES.shard(net, c, net.blocks, whole=[net.quantizer.codebook])
    optimizer = quantize.make_optimizer(net, c)
    pairs = torch.rand(batch, 2, 3, c.image_size, c.image_size, device=DEVICE)
    train = lambda: quantize.train_step(net, optimizer, PROCESSES, c, 1, pairs)
    def label():
        with torch.inference_mode(), PROCESSES.autocast(c):
            net.label(pairs)
    rate = rates[c.bf16] = max(rates[c.bf16], matmul_rate(DTYPES[c.bf16]))  # others may share it
    for name, work in (("training", train), ("labelling", label)):
        flops = counted(work)
        row(f"LAQ {preset} {name}, {batch} pairs, {'bf16' if c.bf16 else 'fp32'}", batch, "pairs",
            seconds(work, 20.0 if preset == "lapa" else 6.0)[0], flops, rate)

def loader():
    with tempfile.TemporaryDirectory() as folder:
        rng, frames = np.random.default_rng(0), []
        for i in range(200):
            picture = Image.fromarray(rng.integers(0, 256, (45, 80, 3), np.uint8))
            picture.resize((320, 180), Image.BICUBIC).save(f"{folder}/{i}.jpg")
            frames.append(np.asarray(Image.open(f"{folder}/{i}.jpg").resize((256, 256))))
        np.save(f"{folder}/x.npy", np.stack(frames))
        episode = data.Episode("a", "b", 5.0, {}, np.load(f"{folder}/x.npy", mmap_mode="r"))
        which = [(0, int(t)) for t in rng.integers(0, 190, 64)]
        jpeg = lambda t: np.asarray(Image.open(f"{folder}/{t}.jpg").convert("RGB").resize(
            (256, 256), Image.BILINEAR))
        for name, work in (("cache", lambda: data.frame_pairs([episode], which, 0.6)),
                           ("two jpegs of 320x180 a pair",
                            lambda: np.stack([(jpeg(t), jpeg(t + 3)) for _, t in which]))):
            row(f"64 pairs of 256x256 from {name}", 128, "frames", seconds(work, 3.0)[0])

def vla(name, shape, batch, length, rates, bf16):
    c = pretrain.PretrainConfig(data="", out="", batch=batch, bf16=bf16)
    torch.manual_seed(0)
    net = VLA(VLAConfig(text_vocab=512, latent_vocab=0, action_vocab=256, **shape)).to(DEVICE)
    picture = net.config.image_tokens
    kinds = torch.zeros(batch, length, dtype=torch.long, device=DEVICE)
    kinds[:, 8:8 + picture] = VISION
    kinds[:, -8:] = ACTION
    tokens = torch.randint(0, 250, kinds.shape, device=DEVICE)
    images = None if net.config.vision_vocab else torch.rand(
        batch, 3, net.config.image_size, net.config.image_size, device=DEVICE)
    rows = {"tokens": tokens, "kinds": kinds, "targets": tokens, "target_kinds": kinds,
            "mask": kinds == ACTION, "images": images}
    optimizer = common.make_optimizer(net.parameter_groups(1e-4, 1.0, (), False), fused=bf16)
    def train():
        PROCESSES.backward(net, c, lambda part: net.answer_loss(
            net(part["tokens"], part["kinds"], part["images"]), part, ACTION), rows)
        common.optimizer_step(optimizer, PROCESSES, c, 1)
    kind = "bf16" if bf16 else "fp32"
    row(f"VLA {name} training, {batch} rows of {length} tokens, {kind}", batch * length, "tokens",
        seconds(train)[0], counted(train), rates[bf16])
    prompt = (tokens[:1, :-8], kinds[:1, :-8].where(kinds[:1, :-8] == VISION, TEXT),
              None if images is None else images[:1],
              torch.ones(1, length - 8, dtype=torch.bool, device=DEVICE), ACTION)
    with torch.inference_mode(), PROCESSES.autocast(c):
        net.eval()
        first, _ = seconds(lambda: net.generate(*prompt, 1), 3.0)
        whole, times = seconds(lambda: net.generate(*prompt, 7), 3.0)
    print(f"| VLA {name} action, batch 1, prompt of {length - 8}, {kind} | "
          f"p50 {1000 * np.median(times):.1f}, p95 {1000 * np.quantile(times, 0.95):.1f} ms | "
          f"prefill {1000 * first:.1f}, 7 tokens {1000 * (whole - first):.1f} ms | |", flush=True)

def main():
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rates = {bf16: matmul_rate(dtype) for bf16, dtype in DTYPES.items()}
    print(f"{DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}; matmul "
          + ", ".join(f"{name} {rates[k] / 1e9:,.0f} GFLOP/s" for k, name in
                      ((False, "fp32"), (True, "bf16"))))
    print("| what | rate | a step | of the matmul rate |\n|---|---|---|---|")
    for preset, batch in (("tiny", 64), ("base", 16), ("lapa", 8)):
        laq(preset, batch, rates)
    loader()
    tiny = dict(dim=128, layers=4, heads=4, mlp=344, vision_vocab=0, image_size=64)
    vla("tiny", tiny, 64, 42, rates, False)
    middle = dict(dim=1024, layers=16, heads=16, mlp=2752, vision_vocab=0, image_size=128)
    vla("200m", middle, 8, 96, rates, True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak memory of it all: {peak:.1f} GB; highest matmul rates seen: "
          + ", ".join(f"{rate / 1e9:,.0f}" for rate in rates.values()) + " GFLOP/s")

if __name__ == "__main__":
    main()
