"""How a row of the benchmarks is measured, and what it is compared with."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import training
from model.laq import Attention

PRODUCTS = ("mm", "matmul", "conv", "softmax")  # in the names of operations
HEADER = "| what | rate | per step | share of machine rate | peak memory |\n|---|---|---|---|---|"


@cache
def processes() -> training.Processes:
    """This process as a stage sets it up: its device, TF32 on GPUs, freed memory kept on CPUs"""
    return training.start_processes()


def wait() -> None:
    """Wait until the GPU has done its work"""
    if processes().device.type == "cuda":
        torch.cuda.synchronize()


def seconds(
    work: Callable[[], object], budget: float, least: int = 1, most: int = 50
) -> tuple[float, list[float]]:
    """Time of the fastest run, and of all: as many as begin within the budget (seconds), at least
    `least`, at most `most`.  A warm-up run comes first."""
    work()
    times = []
    began = time.time()
    while len(times) < least or (time.time() - began < budget and len(times) < most):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times), times


def matmul_rate(bf16: bool, size: int = 2048) -> float:
    """Operations per second of a matrix product"""
    a = torch.rand(size, size, device=processes().device)
    a = a.to(torch.bfloat16 if bf16 else torch.float32)
    return 2 * size**3 / seconds(lambda: a @ a, 0.5)[0]


def bandwidth() -> float:
    """Bytes per second at which a matrix-vector product reads its matrix"""
    a = torch.rand(8192, 8192, device=processes().device)
    return a.nbytes / seconds(lambda: torch.mv(a, a[0]), 0.5)[0]


def peak_memory() -> int:
    """The most bytes that this process, or its GPU, has held"""
    if processes().device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_row(
    name: str, rate: str = "", taken: str = "", share: str = "", memory: float | None = None
) -> None:
    """One row of the table; memory: bytes, or else the peak of this process so far"""
    gigabytes = (peak_memory() if memory is None else memory) / 1e9
    print(f"| {name} | {rate} | {taken} | {share} | {gigabytes:.1f} GB |", flush=True)


def precision(bf16: bool) -> str:
    """The name of a precision in the table"""
    return "bf16" if bf16 else "fp32"


def print_step_row(
    name: str,
    count: int,
    unit: str,
    bf16: bool,
    work: Callable[[], object],
    flops: int | None = None,
) -> None:
    """One row for a step on `count` units of work, beside the faster of two measurements of the
    matmul rate.  flops: of a step's matrix products; None: count them; 0: no share is printed."""
    flops = count_flops(work) if flops is None else flops
    rate_before = matmul_rate(bf16)
    taken, _ = seconds(work, 3.0, least=3)
    rate = max(rate_before, matmul_rate(bf16))
    print_row(
        f"{name}, {precision(bf16)}",
        f"{count / taken:,.1f} {unit}/s",
        f"{1000 * taken:,.1f} ms",
        f"{flops / taken / rate:.0%} of matmul" if flops else "",
    )


def count_flops(work: Callable[[], object]) -> int:
    """Operations of matrix products; the counter takes grouped convolutions for dense ones, so they
    are left out"""
    with FlopCounterMode(display=False) as counter:
        work()
    table = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in table.items() if "conv" not in str(operation))


# ------------------------------------------------------------------------ where a step's time goes
def time_outside(work: Callable[[], object], runs: int = 8) -> tuple[float, float]:
    """Shares of the time, medians of some runs, that are spent outside

    - matrix products, attention modules (with their LayerNorm, cosines, logits and softmax; not
      told apart once compiled) and convolutions;
    - operations that have one of PRODUCTS in their name.

    Backward passes count with what they belong to."""
    with attention_named():
        shares = np.median([profile_once(work) for _ in range(runs)], axis=0)
    return float(shares[0]), float(shares[1])


@contextmanager
def attention_named() -> Iterator[None]:
    """Inside it, attention modules appear in profiles as "attention module" """
    forward = Attention.forward

    def named(self: Attention, *inputs: object, **options: object) -> Tensor:
        with torch.profiler.record_function("attention module"):
            return forward(self, *inputs, **options)

    Attention.forward = named
    try:
        yield
    finally:
        Attention.forward = forward


def profile_once(work: Callable[[], object]) -> np.ndarray:
    """The two shares of time_outside in one run, float [2]"""
    with torch.profiler.profile() as profiler:
        work()
    events = profiler.events()
    attention = forward_numbers(events)
    spent = np.zeros(3)  # outside both, outside named operations, in all
    for event in events:
        parents = list(with_parents(event))
        named = any(
            parent.name.startswith("aten::") and any(word in parent.name for word in PRODUCTS)
            for parent in parents
        )
        attending = any(
            parent.name == "attention module"
            or (is_backward(parent) and parent.sequence_nr in attention)
            for parent in parents
        )
        spent += np.array([not (named or attending), not named, 1]) * event.self_cpu_time_total
    return spent[:2] / spent[2]


def forward_numbers(events: list) -> set[int]:
    """Sequence numbers of the forward operations within attention modules: backward operations
    carry the number of their forward one"""
    numbers = {True: set(), False: set()}
    for event in events:
        parents = list(with_parents(event))
        if not any(is_backward(parent) for parent in parents):
            attending = any(parent.name == "attention module" for parent in parents)
            numbers[attending].add(event.sequence_nr)
    return numbers[True] - numbers[False]


def with_parents(event: torch.autograd.profiler_util.FunctionEvent) -> Iterator:
    """An event of a profile, and all that it is part of"""
    while event is not None:
        yield event
        event = event.cpu_parent


def is_backward(event: torch.autograd.profiler_util.FunctionEvent) -> bool:
    return event.name.startswith("autograd::engine")
