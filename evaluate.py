"""Evaluation (paper 4): roll policies out in a simulator and count successes.

    python evaluate.py --policies LAPA=runs/demo/finetune,SCRATCH=runs/demo/scratch --out eval
    python evaluate.py --policies EXPERT=expert,RANDOM=random --out runs/bounds     # the two ends
    python evaluate.py predict --policy lapa/ --image x.jpg --instruction "pick up the cup"
    python evaluate.py table --results runs/a/results.json,runs/b/results.json --out table.md

A policy is a finetune run, `random`, or `expert` where the simulator has one.  A simulator is a
file in the folder simulators/; docs/simulators.md says how to add one."""

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

import common
import data
import sequences
import training
import video
from common import option
from model import ACTION, LATENT, VLA, VLAConfig, load_strictly


@dataclass(kw_only=True)
class EvaluateConfig:
    policies: str = option(help="name=finetune run, comma-separated")
    out: str = option(help="folder for results.json, results.md, rollouts.gif")
    env: str = option("tabletop", "a simulator: the name of a file in simulators/")
    env_options: str = option("", "of that simulator, e.g. embodiment=human,look=real")
    episodes: int = option(200, "per policy and split")
    splits: str = option("", "comma-separated; empty: all that the simulator names")
    max_steps: int = option(0, "steps until an episode counts as failed; 0: the simulator's own")
    batch: int = option(100, "worlds side by side")
    film: int = option(4, "episodes of each policy in rollouts.gif; 0: no GIF", 0)
    bf16: bool = option(False, "weights and arithmetic of the policies in bfloat16")
    seed: int = option(1000, "worlds and tasks; the same for every policy", 0)


# ------------------------------------------------------------------------ policies
class Policy:
    """A VLA as a function: images uint8 [B, H, W, 3] and instructions -> actions [B, A], or latent
    actions, int [B, K], where it has not been finetuned.  Raises sequences.NoKnownWord for
    instructions without a known word.

    compiled: for control loops.  It recompiles for a new number of images, or of
    prompt tokens in steps of 16."""

    def __init__(
        self,
        path: str | Path,
        asked_by: str = "policies",
        stages: Sequence[str] = ("finetune",),
        bf16: bool = False,
        compiled: bool = False,
    ) -> None:
        weights, meta = common.load_checkpoint(path, asked_by, stages)
        self.device = training.set_up_device()
        with common.refuse(f"--{asked_by} {path}"):
            self.model = self._build_model(weights, meta["model"], bf16)
        self.prompt_multiple = 16 if compiled else 1  # pads prompts to multiples
        if compiled:
            training.check_compiler(self.device, "compiled policies")
            self.model.compile_decode()
        self.sequences = sequences.Sequences(
            sequences.read_tokenizer(path), self.model.config.image_tokens, meta["template"]
        )
        self.known_instructions = set()  # those with a known word
        self._read_kind_of_answer(meta)
        if self.kind not in self.model.vocabularies():
            common.fail(f"--{asked_by} {path}: predicts neither latent nor robot actions")
        self.vqgan = data.open_vqgan(path, asked_by, self.device, meta["model"])

    def _build_model(self, weights: Mapping[str, Any], shape: dict, bf16: bool) -> VLA:
        """A VLA of this shape (VLAConfig's fields) with these weights, for inference"""
        with torch.device("meta"):  # no memory, no time for numbers that are replaced
            model = VLA(VLAConfig(**shape))
        model.to(torch.bfloat16 if bf16 else torch.float32).to_empty(device=self.device)
        load_strictly(model, weights)
        return model.eval()

    def _read_kind_of_answer(self, meta: dict) -> None:
        """What the model answers: kind (ACTION or LATENT), its number of tokens, and the edges of
        the action bins, where the checkpoint (whose config.json is meta) holds them"""
        self.kind = ACTION if self.model.config.action_vocab else LATENT
        self.edges = [np.array(edges) for edges in meta.get("bins", ())]
        default = 4 if self.kind == LATENT else 7
        self.answer_length = len(self.edges) or meta.get("code_len", default)

    def __call__(self, images: Sequence[np.ndarray], instructions: Sequence[str]) -> np.ndarray:
        for text in set(instructions) - self.known_instructions:
            self.sequences.check_words([text])
            self.known_instructions.add(text)
        pictures, codes = self._read_images(images)
        tokens, kinds, valid = (
            x.to(self.device)
            for x in self.sequences.prompts(instructions, self.kind, codes, self.prompt_multiple)
        )
        answer = self.model.generate(
            tokens, kinds, pictures, valid, self.kind, self.answer_length
        )  # B answer_length
        answer = answer.cpu().numpy()
        return data.from_bins(answer, self.edges) if self.edges else answer

    def _read_images(
        self, images: Sequence[np.ndarray]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """-> pictures float [B, 3, S, S] in [-1, 1] and None, or None and the codes int64 [B, N]
        that a model with a VQGAN reads instead"""
        resize = data.official_resize if self.vqgan else data.resize
        frames = np.stack([resize(image, self.model.config.image_size) for image in images])
        pictures = data.to_float(frames, self.device) * 2 - 1
        if self.vqgan:
            return None, self.vqgan.encode(pictures).cpu()
        return pictures, None


def open_policies(text: str, env: str, simulator: type, bf16: bool) -> dict[str, Policy | str]:
    """ "LAPA=runs/a,RANDOM=random" -> {name: Policy, "expert" or "random"}

    simulator: the class of --env.  Refuses runs without a checkpoint or with another action
    width, and an expert where there is none."""
    policies = {}
    for part in re.split(r",(?=[^,=]+=)", text):
        name, _, path = part.partition("=")
        if not (name and path) or name in policies:
            common.fail(f"--policies {part!r}: expected name=finetune run, each name once")
        if path == "expert" and not hasattr(simulator, "expert"):
            common.fail(f"--policies {part}: --env {env} has no expert")
        policies[name] = path if path in ("expert", "random") else Policy(path, bf16=bf16)
        if isinstance(policies[name], Policy):
            width = len(policies[name].edges)
            if width != simulator.ACTION_DIM:
                common.fail(
                    f"--policies {path}: predicts {width} action dimensions, --env {env} takes "
                    f"{simulator.ACTION_DIM}"
                )
    return policies


# ------------------------------------------------------------------------ rollouts
class Rollout(NamedTuple):
    """n episodes that ran side by side, and the frames of the first m of them"""

    frames: np.ndarray  # uint8 [m, T, H, W, 3]
    instructions: list[str]  # n
    success: np.ndarray  # bool [n]
    families: list[str]  # n


def import_simulators() -> ModuleType:
    """The package simulators, imported only here: other commands work without that folder"""
    spec = importlib.util.find_spec("simulators")
    if spec is None or spec.origin is None:  # no such folder, or one without code
        common.fail("--env: evaluation needs the folder simulators/, which is missing")
    return importlib.import_module("simulators")


def roll_out(
    policy: Policy | str, c: EvaluateConfig, split: str, first: int, count: int, film: int
) -> Rollout:
    """`count` episodes side by side, worlds from `first` on, with the frames of `film` of them"""
    env = import_simulators().open_simulator(c.env, count, split, c.max_steps, c.env_options)
    rng = np.random.default_rng((c.seed, first, 1))  # of the random policy
    obs, info = env.reset((c.seed, first))
    frames = [obs["image"][:film].copy()]
    done = np.zeros(count, bool)
    while not done.all():
        if policy == "expert":
            action = env.expert()
        elif policy == "random":
            shape = (count, env.ACTION_DIM)
            action = rng.uniform(env.ACTION_LOW, env.ACTION_HIGH, shape)
        else:
            action = np.zeros((count, env.ACTION_DIM))
            live = np.flatnonzero(~done)
            with common.refuse("--policies", (sequences.NoKnownWord,)):
                action[live] = policy(obs["image"][live], [obs["instruction"][i] for i in live])
        obs, _, terminated, truncated, info = env.step(action)
        done = terminated | truncated
        frames.append(obs["image"][:film].copy())
    return Rollout(np.stack(frames, 1), obs["instruction"], info["success"], info["family"])


def success_rate(success: Sequence[bool]) -> dict[str, float]:
    """Successes bool [n] -> percentage and its binomial standard error"""
    p = float(np.mean(success))
    n = len(success)
    return {"success": round(100 * p, 2), "se": round(100 * (p * (1 - p) / n) ** 0.5, 2), "n": n}


def count_successes(rollouts: Iterable[Rollout], families: Sequence[str]) -> dict:
    """-> success_rate of all their episodes and, under "families", of each family that occurs"""
    pairs = [pair for r in rollouts for pair in zip(r.families, r.success, strict=True)]
    by_family = {
        family: [won for of, won in pairs if of == family]
        for family in families
        if any(of == family for of, _ in pairs)
    }
    row = success_rate([won for _, won in pairs])
    return row | {"families": {name: success_rate(won) for name, won in by_family.items()}}


def resolve(c: EvaluateConfig) -> tuple[EvaluateConfig, type]:
    """-> the options with the simulator's own splits and max_steps where none are given, and its
    class.  Refuses, before any policy runs, what cannot be opened."""
    simulators = import_simulators()
    simulator = simulators.find_simulator(c.env)
    c = dataclasses.replace(
        c,
        splits=c.splits or ",".join(simulator.SPLITS),
        max_steps=c.max_steps or simulator.MAX_STEPS,
    )
    for split in c.splits.split(","):
        simulators.open_simulator(c.env, 1, split, c.max_steps, c.env_options)
    return c, simulator


def evaluate(c: EvaluateConfig) -> None:
    """Every policy on every split; results.json, results.md and rollouts.gif in c.out"""
    c, simulator = resolve(c)
    policies = open_policies(c.policies, c.env, simulator, c.bf16)
    with common.refuse(f"--out {c.out}"):
        Path(c.out).mkdir(parents=True, exist_ok=True)
    began = time.time()
    arms = {}
    films = {}
    for name, policy in policies.items():
        arms[name] = {}
        for split in c.splits.split(","):
            rollouts = []
            for first in range(0, c.episodes, c.batch):
                count = min(c.batch, c.episodes - first)
                film = 0 if name in films else c.film  # of the first worlds
                rollouts.append(roll_out(policy, c, split, first, count, film))
                films.setdefault(name, rollouts[0])
            row = arms[name][split] = count_successes(rollouts, simulator.FAMILIES)
            rate = f"{row['success']:.1f} +- {row['se']:.1f} % of {row['n']}"
            print(f"{name} {split}: {rate}", flush=True)
    results = {"arms": arms, "options": c.__dict__, "seconds": round(time.time() - began, 1)}
    write_results(results, markdown([arms], simulator.FAMILIES), films if c.film else {}, c.out)


def write_results(results: dict, text: str, films: dict[str, Rollout], out: str) -> None:
    """Write results.json, results.md (the text, also printed) and, if films, rollouts.gif"""
    files = [Path(out) / name for name in ("results.json", "results.md", "rollouts.gif")]
    common.write_atomically(files[0], common.to_json(results, 1) + "\n")
    common.write_atomically(files[1], text)
    print(text, end="")
    if films:
        draw_film(films, files[2])
    print("wrote", ", ".join(map(str, files if films else files[:2])))


# ------------------------------------------------------------------------ tables and films
def markdown(runs: Sequence[dict], families: Sequence[str] = ()) -> str:
    """Results of one or more seeds, [{arm: {split: row}}], as a table: success % and, of one seed,
    its binomial standard error; of several, the standard error of their mean.

    families: further columns, "-" where a family does not occur"""
    first_arm = next(iter(runs[0].values()))
    columns = [(split, family) for split in first_arm for family in (None, *families)]

    def cell(arm: str, split: str, family: str | None) -> str:
        rows = [
            run[arm][split] if family is None else run[arm][split]["families"].get(family)
            for run in runs
        ]
        if None in rows:
            return "-"
        values = [row["success"] for row in rows]
        error = np.std(values, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else rows[0]["se"]
        return f"{np.mean(values):.1f} ± {error:.1f}"

    title = f"success % of {next(iter(first_arm.values()))['n']}"
    if len(runs) > 1:
        title += f", mean of {len(runs)} seeds"
    head = [f"{title} (± standard error)"]
    head += [family or f"**{split}**" for split, family in columns]
    rows = [[name.replace("_", " "), *(cell(name, *c) for c in columns)] for name in runs[0]]
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines) + "\n"


def families_of(arms: dict) -> list[str]:
    """The families in results, {arm: {split: row}}, in the order in which they appear"""
    rows = [row for arm in arms.values() for row in arm.values()]
    return list(dict.fromkeys(family for row in rows for family in row["families"]))


def draw_film(films: dict[str, Rollout], path: Path, size: int = 150, head: int = 42) -> None:
    """An animated GIF: one row per policy, its rollouts side by side, the instruction above each.

    size: pixels of a picture's side; head: height of the words above it"""
    longest = max(rollout.frames.shape[1] for rollout in films.values())
    pages = [draw_page(films, t, size, head) for t in range(longest + 5)]  # hold the last: 1 s
    with common.refuse(f"{path}: not written"), common.atomically(path) as draft:
        pages[0].save(draft, save_all=True, append_images=pages[1:], duration=200, loop=0)


def draw_page(films: dict[str, Rollout], t: int, size: int, head: int) -> Image.Image:
    """Frame t of a film; of a finished rollout, its last frame and its result"""
    count = len(next(iter(films.values())).frames)
    page = Image.new("RGB", (4 + count * (size + 4), len(films) * (size + head)), "white")
    pen = ImageDraw.Draw(page)
    for row, (name, rollout) in enumerate(films.items()):
        last = rollout.frames.shape[1] - 1
        for column, frames in enumerate(rollout.frames):
            x = 4 + column * (size + 4)
            y = row * (size + head)
            result = "" if t < last else ": success" if rollout.success[column] else ": failed"
            pen.text((x, y + 1), name + result, fill="black")
            pen.text((x, y + 12), textwrap.fill(rollout.instructions[column], 24), fill="black")
            frame = Image.fromarray(frames[min(t, last)]).resize((size, size), Image.BICUBIC)
            page.paste(frame, (x, y + head))
    return page.quantize(128)


# ------------------------------------------------------------------------ one image, several seeds
@dataclass(kw_only=True)
class PredictConfig:
    policy: str = option(help="pretrain or finetune run, or converted official weights")
    image: str = option(help="picture file")
    instruction: str = option(help="what the robot is told")
    bf16: bool = option(False, "weights and arithmetic in bfloat16")


def predict(c: PredictConfig) -> None:
    """Print the latent action, or the robot's, for one picture and instruction"""
    with common.refuse(f"--image {c.image}: cannot be read", (OSError, ValueError, SyntaxError)):
        image = video.read_picture(c.image)
    policy = Policy(c.policy, "policy", ("pretrain", "finetune"), c.bf16)
    began = time.time()
    with common.refuse(f"--instruction {c.instruction!r}", (sequences.NoKnownWord, UnicodeError)):
        text = os.fsencode(c.instruction).decode()  # UTF-8, whatever the locale says
        (answer,) = policy([image], [text])
    what = "latent action" if policy.kind == LATENT else "action" if policy.edges else "action bins"
    print(f"{what}: {answer.tolist()} ({time.time() - began:.3f} s)")


@dataclass(kw_only=True)
class TableConfig:
    results: str = option(help="results.json files of the seeds, comma-separated")
    out: str = option(help="Markdown file to write")


def table(c: TableConfig) -> None:
    """Mean success over seeds; for one seed, also by family"""
    with common.refuse(
        f"--results {c.results}: not results for the same arms and splits",
        (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration),
    ):
        runs = [
            json.loads(Path(path).read_text(encoding="utf-8"))["arms"]
            for path in c.results.split(",")
        ]
        text = markdown(runs, families_of(runs[0]) if len(runs) == 1 else ())
    common.write_atomically(c.out, text)
    print(text + f"wrote {c.out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["predict"]:
        predict(common.parse_options(PredictConfig, sys.argv[2:])[0])
    elif sys.argv[1:2] == ["table"]:
        table(common.parse_options(TableConfig, sys.argv[2:])[0])
    else:
        evaluate(common.parse_options(EvaluateConfig, sys.argv[1:])[0])
