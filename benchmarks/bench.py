"""Speed and memory of the parts, one table:    python -m benchmarks.bench [cpu|compiled|gpu|memory]

Each row is set against the matmul rate (of its precision) or the memory bandwidth, measured in the
row's own process.  `compiled` compares tiny networks with and without torch.compile.
`memory` computes what finetuning a 7B takes, on any machine.  Tables and what they say:
docs/benchmarks.md."""

import sys

import torch

from benchmarks.measure import HEADER, bandwidth, matmul_rate, processes
from benchmarks.memory import print_memory_table
from benchmarks.networks import laq, vla
from benchmarks.pipeline import loader, stages
from common import fail

PARTS = {  # what is measured: functions and their arguments
    "cpu": [
        (laq, "tiny", 64),
        (laq, "base", 16),
        (laq, "lapa", 8),
        (loader,),
        (vla, "tiny"),
        (vla, "200m"),
        (vla, "1b"),
        (stages,),
    ],
    "compiled": [
        (laq, "tiny", 64, False, True),
        (laq, "tiny", 64, True, True),
        (vla, "tiny", 0, True),
    ],
    "gpu": [(laq, "lapa", 64), (vla, "1b", 0, True), (vla, "7b", 0, True), (vla, "7b", 16)],
}


def main(what: str = "cpu") -> None:
    if what == "memory":
        print_memory_table()
        return
    if what not in PARTS:
        fail(f"{what!r}: expected one of {', '.join(PARTS)}, memory")
    device = processes().device
    if what == "gpu" and device.type != "cuda":
        fail("torch sees no GPU here")
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; matmul "
        f"{matmul_rate(False) / 1e9:,.0f} (fp32) and {matmul_rate(True) / 1e9:,.0f} (bf16) "
        f"GFLOP/s, memory {bandwidth() / 1e9:,.0f} GB/s"
    )
    print(HEADER)
    for work, *arguments in PARTS[what]:
        child = torch.multiprocessing.get_context("spawn").Process(target=work, args=arguments)
        child.start()
        child.join()
        if child.exitcode:
            fail(f"{work.__name__} {arguments}: exit code {child.exitcode}")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        fail(f"{sys.argv[2]!r}: one argument at most")
    main(*sys.argv[1:])
