"""Gain of each fast path in model/laq.py over the plain form beside it.

    OMP_NUM_THREADS=1 python -m benchmarks.fast_paths

Both run in turn in one process, in float32 on one CPU thread, on the shapes that the presets tiny
(64 pairs) and lapa (8 pairs) give them.  The gain is the ratio of their median times: in training
(forward and backward) and in inference."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

import model

PRESETS = {  # dim, heads, dim_head, pairs
    "tiny": (96, 4, 24, 64),
    "lapa": (1024, 16, 64, 8),
}
GRID = 8
SECONDS = 2.0  # for each pair of forms


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def train(form: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    for tensor in leaves:
        tensor.grad = None
    form().square().mean().backward()


def infer(form: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        form()


def times(plain: Callable[[], None], fast: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of both, run in turn"""

    def timed(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    timed(plain), timed(fast)  # to warm up
    rounds = []
    end = time.time() + SECONDS
    while time.time() < end or len(rounds) < 5:
        rounds.append((timed(plain), timed(fast)))
    plain_times, fast_times = zip(*rounds, strict=True)
    return median(plain_times), median(fast_times)


def row(
    what: str, plain: Callable[..., Tensor], fast: Callable[..., Tensor], *leaves: Tensor
) -> None:
    cells = []
    for how in (partial(train, leaves=leaves), infer):
        before, after = times(partial(how, plain), partial(how, fast))
        cells.append(f"{1000 * before:.2f} -> {1000 * after:.2f} ms, x {before / after:.1f}")
    print(f"| {what} | {' | '.join(cells)} |", flush=True)


def measure(name: str, dim: int, heads: int, dim_head: int, pairs: int) -> None:
    N = GRID**2
    peg = model.laq.PEG(dim)
    for T in (1, 2):
        x = leaf(pairs, T, N, dim)
        row(
            f"{name}: PEG {list(x.shape)}",
            partial(peg.convolve, x, GRID),
            partial(peg.convolve_two, x, GRID),
            x,
            *peg.parameters(),
        )
    q, k, v = (leaf(pairs * N, 2, heads, dim_head) for _ in range(3))
    plain, fast = partial(model.laq.attend, q, k, v), partial(model.laq.attend_to_two, q, k, v)
    row(f"{name}: attention over two frames {list(q.shape)}", plain, fast, q, k, v)
    q, k, v = (leaf(2 * pairs, N, heads, dim_head) for _ in range(3))
    bias = leaf(1, heads, N, N)
    plain = partial(model.laq.attend, q, k, v, bias)
    fast = partial(model.laq.attend_by_products, q, k, v, bias)
    row(f"{name}: attention over the grid {list(q.shape)}", plain, fast, q, k, v, bias)
    q = leaf(pairs, N, heads, dim_head)
    k, v = (leaf(pairs, 2 + 4, heads, dim_head) for _ in range(2))  # null keys and codes
    plain, fast = partial(model.laq.attend, q, k, v), partial(model.laq.attend_by_products, q, k, v)
    row(f"{name}: cross-attention {list(q.shape)}, 6 keys", plain, fast, q, k, v)
    position_bias = model.laq.PositionBias(dim, heads, GRID)
    row(
        f"{name}: position bias, {GRID}x{GRID} patches",
        position_bias.compute,
        position_bias.look_up,
        *position_bias.parameters(),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| what | training | inference |\n|---|---|---|")
    for preset, sizes in PRESETS.items():
        measure(preset, *sizes)
