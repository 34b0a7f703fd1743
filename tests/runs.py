"""The command line of every stage, each with two steps of training, and how to read what a run
wrote; and a run of a network of one weight."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.optim import Optimizer

import common
import quantize
import training
from model import LAQConfig

SHORT = "--preset tiny --steps 2 --batch 8 --log_every 1"
PRETRAIN = f"pretrain.py {SHORT} --data DIR/table --held_out 2 --init_from DIR/base"
FINETUNE = f"finetune.py {SHORT} --held_out 2 --labelled 6 --data DIR/table"
LABELLED = "--laq DIR/laq --data DIR/table"
WAVES = [  # name -> command line, DIR: folder of all runs; those of one wave run side by side
    {
        "table": "-m simulators.tabletop DIR/table --episodes 12",
        "scenes": "-m simulators.tabletop DIR/scenes --scenes 200 --seed 2",
    },
    {
        "check": "data.py check DIR/table",
        "laq": f"quantize.py {SHORT} --data DIR/table --out DIR/laq --held_out 2",
        "base": f"pretrain.py {SHORT} --labels caption --data DIR/scenes --out DIR/base",
        "guesses": "-m baselines.inverse_dynamics --preset tiny --steps 2 --data DIR/table "
        "--held_out 2 --labelled 6 --out DIR/guesses.safetensors",
    },
    {
        "label": f"quantize.py label {LABELLED} --out DIR/labels.safetensors",
        "report": f"quantize.py report {LABELLED} --out DIR/report --held_out 2",
        "latent": f"{PRETRAIN} --labels latent --laq DIR/laq --out DIR/latent",
        "action": f"{PRETRAIN} --labels action --out DIR/action",
        "idm": f"{PRETRAIN} --labels idm --labels_file DIR/guesses.safetensors --out DIR/idm",
    },
    {
        "LAPA": f"{FINETUNE} --init_from DIR/latent --out DIR/LAPA",
        "SCRATCH": f"{FINETUNE} --init_from DIR/base --out DIR/SCRATCH",
        "ACTIONVLA": f"{FINETUNE} --init_from DIR/action --out DIR/ACTIONVLA",
    },
    {
        "evaluate": "evaluate.py --policies LAPA=DIR/LAPA,SCRATCH=DIR/SCRATCH,RANDOM=random,"
        "EXPERT=expert --out DIR/evaluate --episodes 5 --batch 3 --film 2 --max_steps 5"
    },
    {"means": "evaluate.py table --results DIR/evaluate/results.json --out DIR/means/table.md"},
]
COMMANDS = {name: line for wave in WAVES for name, line in wave.items()}


def fill_in(line: str, folders: dict[str, Path]) -> str:
    """fill_in("--out DIR/x", {"DIR": folder}): a command line with its folders"""
    return re.sub("|".join(folders), lambda found: str(folders[found[0]]), line)


def read_jsonl(path: Path) -> list[dict]:
    """The rows of episodes.jsonl or of a log"""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_config(run: Path) -> dict:
    """config.json of a run's newest checkpoint"""
    return json.loads((common.latest(run) / "config.json").read_text(encoding="utf-8"))


def read_weights(run: Path) -> dict[str, Tensor]:
    """The weights of a run's newest checkpoint"""
    return load_file(common.latest(run) / "model.safetensors")


def read_training_state(checkpoint: Path) -> dict:
    """What a checkpoint keeps for resuming: model and optimizer"""
    path = checkpoint / "training_state.pt"
    dcp_to_torch_save(checkpoint / "training", path)
    state = torch.load(path)
    path.unlink()
    return state


def read_losses(run: Path) -> list[float]:
    """The losses of a run that logged every step"""
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two tables hold the same tensors, to the bit"""
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def make_run(out: str | Path, **options: object) -> tuple[training.Run, nn.Module, Optimizer]:
    """A Run of a network of one weight, that network, and its optimizer"""
    options = {"steps": 10**6, "save_every": 1} | options
    config = quantize.QuantizeConfig(data="", out=str(out), **options)
    network = nn.Linear(2, 1, bias=False)
    processes = training.start_processes()
    files = {"words.json": "[]"}
    run = training.Run(config, processes, "quantize", LAQConfig(), {}, files=files)
    optimizer = training.make_optimizer([{"params": list(network.parameters()), "lr": 0.1}])
    run.resume(network, optimizer)
    return run, network, optimizer
