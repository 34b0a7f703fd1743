"""Evaluation (paper 4): roll policies out in the table top and count successes.

    python evaluate.py --policies LAPA=runs/demo/finetune,SCRATCH=runs/demo/scratch --out eval
    python evaluate.py --policies EXPERT=expert,RANDOM=random --out runs/bounds     # the two ends
    python evaluate.py predict --policy lapa/ --image x.jpg --instruction "pick up the cup"
    python evaluate.py table --results runs/a/results.json,runs/b/results.json --out table.md

A policy is a finetune run, or `expert` or `random`.  "seen" episodes use instructions and object
combinations that the labelled few may show, "unseen" ones the rest (see tabletop.tasks)."""

import json
import os
import re
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import common
import data
import sequences
import video
from model import ACTION, LATENT, VLA, VLAConfig, load_strictly
from simulators import tabletop


@dataclass(kw_only=True)
class EvaluateConfig:
    policies: str  # name=finetune run, comma separated
    out: str  # folder for results.json, results.md, rollouts.gif
    episodes: int = 200  # a policy and split
    splits: str = "seen,unseen"  # which instructions
    embodiment: str = "robot"  # robot or human
    look: str = "plain"  # plain or real
    max_steps: int = 50  # steps until an episode counts as failed
    batch: int = 100  # tables side by side
    film: int = 4  # episodes of each policy in rollouts.gif; 0: no film
    bf16: bool = False  # weights and arithmetic of the policies in bfloat16
    seed: int = 1000  # tables and tasks; the same for every policy


# ------------------------------------------------------------------------ policies
class Policy:
    """A VLA as a function: images uint8 [B, H, W, 3] and instructions -> actions [B, A], or latent
    actions, int [B, K], where it has not been finetuned.  Raises sequences.NoKnownWord for instructions
    of which it knows no word.  compiled: for control loops; compiles anew for another number of
    images, or of the prompt's tokens in steps of 16"""

    def __init__(self, path, option="policies", stages=("finetune",), bf16=False, compiled=False):
        weights, meta = common.load_checkpoint(path, option, stages)
        self.device = common.Processes().device
        with common.refuse(f"--{option} {path}"):
            with torch.device("meta"):
                self.model = VLA(VLAConfig(**meta["model"]))
            self.model.to(torch.bfloat16 if bf16 else torch.float32).to_empty(device=self.device)
            load_strictly(self.model, weights)
        self.model.eval()
        self.multiple = 16 if compiled else 1  # prompts are padded to that
        if compiled:
            common.check_compiler(self.device, "compiled policies")
            self.model.compile_decode()
        tokenizer = sequences.read_tokenizer(path)
        self.sequences = sequences.Sequences(
            tokenizer, self.model.config.image_tokens, meta["template"]
        )
        self.checked = set()  # instructions
        self.kind = ACTION if self.model.config.action_vocab else LATENT
        self.edges = [np.array(e) for e in meta.get("bins", ())]
        self.length = len(self.edges) or meta.get("code_len", 4 if self.kind == LATENT else 7)
        if self.kind not in self.model.vocabularies():
            common.fail(f"--{option} {path}: predicts neither latent nor robot actions")
        self.vqgan = data.open_vqgan(path, option, self.device, meta["model"])

    def __call__(self, images, instructions):
        for text in set(instructions) - self.checked:
            self.sequences.check_words([text])
            self.checked.add(text)
        resize = data.official_resize if self.vqgan else data.resize
        frames = np.stack([resize(image, self.model.config.image_size) for image in images])
        pictures, codes = data.to_float(frames, self.device) * 2 - 1, None
        if self.vqgan:
            pictures, codes = None, self.vqgan.encode(pictures).cpu()
        tokens, kinds, valid = (
            x.to(self.device)
            for x in self.sequences.prompts(instructions, self.kind, codes, self.multiple)
        )
        answer = self.model.generate(tokens, kinds, pictures, valid, self.kind, self.length)
        answer = answer.cpu().numpy()
        return data.from_bins(answer, self.edges) if self.edges else answer


def open_policies(text, **how):
    """ "LAPA=runs/a,RANDOM=random" -> {name: Policy, "expert" or "random"}; refuses what has no
    checkpoint or another action width than the table top's 2"""
    policies = {}
    for part in re.split(r",(?=[^,=]+=)", text):
        name, _, path = part.partition("=")
        if not (name and path) or name in policies:
            common.fail(f"--policies {part!r}: expected name=finetune run, each name once")
        policies[name] = path if path in ("expert", "random") else Policy(path, **how)
        if isinstance(policies[name], Policy) and len(policies[name].edges) != 2:
            common.fail(
                f"--policies {path}: predicts {len(policies[name].edges)} action "
                "dimensions, the table top takes 2"
            )
    return policies


# ------------------------------------------------------------------------ rollouts
def rollout(policy, c, split, first, count):
    """`count` episodes side by side, tables number `first` on.  -> success bool [count], families,
    and for the first c.film tables the frames and instructions"""
    env = tabletop.TableTop(count, c.embodiment, c.look, split, max_steps=c.max_steps)
    obs, info = env.reset((c.seed, first))
    rng, film = np.random.default_rng((c.seed, first, 1)), [obs["image"][: c.film]]
    while not env.done.all():
        action = np.zeros((count, 2))
        live = np.flatnonzero(~env.done)
        if policy == "expert":
            action = env.expert()
        elif policy == "random":
            action = rng.uniform(-1, 1, (count, 2))
        else:
            with common.refuse("--policies", (sequences.NoKnownWord,)):
                action[live] = policy(obs["image"][live], [obs["instruction"][i] for i in live])
        obs, _, _, _, info = env.step(action)
        film.append(obs["image"][: c.film])
    return info["success"], info["family"], np.stack(film, 1), obs["instruction"]


def share(success):
    """Successes bool [n] -> percentage and its binomial standard error"""
    p, n = float(np.mean(success)), len(success)
    return {"success": round(100 * p, 2), "se": round(100 * (p * (1 - p) / n) ** 0.5, 2), "n": n}


def evaluate(c):
    policies = open_policies(c.policies, bf16=c.bf16)
    splits = c.splits.split(",")
    with common.refuse("rollouts"):
        for split in splits:
            tabletop.TableTop(1, c.embodiment, c.look, split)
    with common.refuse(f"--out {c.out}"):
        Path(c.out).mkdir(parents=True, exist_ok=True)
    arms, films, began = {name: {} for name in policies}, {}, time.time()
    for name, policy in policies.items():
        for split in splits:
            success, family = [], []
            for first in range(0, c.episodes, c.batch):
                count = min(c.batch, c.episodes - first)
                won, families, film, said = rollout(policy, c, split, first, count)
                success, family = success + list(won), family + families
                films.setdefault(name, (film, said, won))  # of the first tables
            row = arms[name][split] = share(success) | {
                "families": {
                    f: share([s for s, g in zip(success, family) if g == f])
                    for f in tabletop.FAMILIES
                    if f in family
                }
            }
            print(
                f"{name} {split}: {row['success']:.1f} +- {row['se']:.1f} % of {row['n']}",
                flush=True,
            )
    results = {"arms": arms, "options": c.__dict__, "seconds": round(time.time() - began, 1)}
    files = [Path(c.out) / name for name in ("results.json", "results.md", "rollouts.gif")]
    common.write_atomically(files[0], common.to_json(results, 1) + "\n")
    text = markdown([arms])
    common.write_atomically(files[1], text)
    print(text, end="")
    if c.film:
        draw_film(films, files[2])
    print("wrote", ", ".join(map(str, files if c.film else files[:2])))


def markdown(runs):
    """Results of one or more seeds, [{arm: {split: row}}], as a table: success % and, of one seed,
    its binomial standard error and the families; of several, the standard error of their mean"""
    families = tabletop.FAMILIES if len(runs) == 1 else ()
    first = next(iter(runs[0].values()))
    columns = [(s, f) for s in first for f in (None, *families)]

    def cell(arm, split, family):
        rows = [
            run[arm][split] if family is None else run[arm][split]["families"].get(family)
            for run in runs
        ]
        if None in rows:
            return "-"
        values = [row["success"] for row in rows]
        error = np.std(values, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else rows[0]["se"]
        return f"{np.mean(values):.1f} ± {error:.1f}"

    what = f"success % of {next(iter(first.values()))['n']}" + (
        f", mean of {len(runs)} seeds" if len(runs) > 1 else ""
    )
    head = [f"{what} (± standard error)"] + [f or f"**{s}**" for s, f in columns]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += [
        "| " + " | ".join([name.replace("_", " "), *(cell(name, *c) for c in columns)]) + " |"
        for name in runs[0]
    ]
    return "\n".join(lines) + "\n"


def draw_film(films, path, size=150, head=42):
    """films: policy -> frames [n, T, S, S, 3], instructions, successes.  An animated GIF: one row a
    policy, its n rollouts side by side, the instruction above each"""
    counts, lengths = zip(*(film.shape[:2] for film, _, _ in films.values()))
    width, height, pages = 4 + counts[0] * (size + 4), len(films) * (size + head), []
    for t in range(max(lengths) + 5):  # hold the last picture for a second
        page = Image.new("RGB", (width, height), "white")
        pen = ImageDraw.Draw(page)
        for r, (name, (film, said, won)) in enumerate(films.items()):
            last = film.shape[1] - 1
            for i, frames in enumerate(film):
                x, y = 4 + i * (size + 4), r * (size + head)
                result = "" if t < last else ": success" if won[i] else ": failed"
                pen.text((x, y + 1), name + result, fill="black")
                pen.text((x, y + 12), textwrap.fill(said[i], 24), fill="black")
                frame = Image.fromarray(frames[min(t, last)]).resize((size, size), Image.BICUBIC)
                page.paste(frame, (x, y + head))
        pages.append(page.quantize(128))
    with common.refuse(f"{path}: not written"), common.atomically(path) as draft:
        pages[0].save(draft, save_all=True, append_images=pages[1:], duration=200, loop=0)


# ------------------------------------------------------------------------ one image, several seeds
@dataclass(kw_only=True)
class PredictConfig:
    policy: str  # pretrain or finetune run, or converted official weights
    image: str  # picture file
    instruction: str  # what the robot is told
    bf16: bool = False  # weights and arithmetic in bfloat16


def predict(c):
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
    results: str  # results.json files of the seeds, comma separated
    out: str  # Markdown file to write


def table(c):
    """Mean success over seeds"""
    with common.refuse(
        f"--results {c.results}: not results for the same arms and splits",
        (OSError, ValueError, LookupError, TypeError, StopIteration),
    ):
        runs = [
            json.loads(Path(path).read_text(encoding="utf-8"))["arms"]
            for path in c.results.split(",")
        ]
        text = markdown(runs)
    common.write_atomically(c.out, text)
    print(text + f"wrote {c.out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["predict"]:
        predict(common.parse_options(PredictConfig, sys.argv[2:])[0])
    elif sys.argv[1:2] == ["table"]:
        table(common.parse_options(TableConfig, sys.argv[2:])[0])
    else:
        evaluate(common.parse_options(EvaluateConfig, sys.argv[1:])[0])
