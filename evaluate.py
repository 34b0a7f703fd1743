"""Evaluation (paper 4): roll policies out in the table top and count successes.

    python evaluate.py --policies LAPA=runs/demo/finetune,SCRATCH=runs/demo/scratch --out eval
    python evaluate.py --policies EXPERT=expert,RANDOM=random --out runs/bounds     # the two ends
    python evaluate.py table --results runs/a/results.json,runs/b/results.json --out table.md

A policy is a finetune run, or `expert` or `random`.  "seen" episodes use instructions and object
combinations that the labelled few may show, "unseen" ones the rest (see tabletop.tasks).
"""

import json
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
import tabletop
from model import ACTION, VLA, VLAConfig, load_strictly


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
    seed: int = 1000  # tables and tasks; the same for every policy


# ------------------------------------------------------------------------ policies

class Policy:
    """A finetuned VLA as a function: images uint8 [B, H, W, 3] + instructions -> actions [B, A]"""

    def __init__(self, path, option="policies"):
        weights, meta = common.load_checkpoint(path, option, ("finetune",))
        self.device = common.Processes().device
        with common.refuse(f"--{option} {path}"):
            self.model = VLA(VLAConfig(**meta["model"]))
            load_strictly(self.model, weights)
        self.model.to(self.device).eval()
        tokenizer = data.read_tokenizer(common.find_checkpoint(path, option) / "tokenizer.json")
        self.sequences = data.Sequences(tokenizer, self.model.image_tokens, meta["template"])
        self.edges = [np.array(e) for e in meta["bins"]]

    def __call__(self, images, instructions):
        size = self.model.config.image_size
        frames = np.stack([data.resize(image, size) for image in images])
        prompt = [x.to(self.device) for x in self.sequences.prompts(instructions, ACTION)]
        pictures = data.to_float(frames).to(self.device) * 2 - 1
        with torch.inference_mode():
            tokens = self.model.generate(prompt[0], prompt[1], pictures, prompt[2], ACTION,
                                         len(self.edges))
        return data.from_bins(tokens.cpu().numpy(), self.edges)


def open_policies(text):
    """"LAPA=runs/a,RANDOM=random" -> {name: Policy, "expert" or "random"}; refuses what has no
    checkpoint or another action width than the table top's 2"""
    policies = {}
    for part in text.split(","):
        name, equals, path = part.partition("=")
        if not (name and path) or name in policies:
            common.fail(f"--policies {part!r}: expected name=finetune run, each name once")
        policies[name] = path if path in ("expert", "random") else Policy(path)
        if isinstance(policies[name], Policy) and len(policies[name].edges) != 2:
            common.fail(f"--policies {path}: predicts {len(policies[name].edges)} action "
                        "dimensions, the table top takes 2")
    return policies


# ------------------------------------------------------------------------ rollouts

def rollout(policy, c, split, first, count):
    """`count` episodes side by side, tables number `first` on.  -> success bool [count], families,
    and for the first c.film tables the frames and instructions"""
    env = tabletop.TableTop(count, c.embodiment, c.look, split, max_steps=c.max_steps)
    obs, info = env.reset((c.seed, first))
    rng, film = np.random.default_rng((c.seed, first, 1)), [obs["image"][:c.film]]
    while not env.done.all():
        action = np.zeros((count, 2))
        live = np.flatnonzero(~env.done)
        if policy == "expert":
            action = env.expert()
        elif policy == "random":
            action = rng.uniform(-1, 1, (count, 2))
        else:
            action[live] = policy(obs["image"][live], [obs["instruction"][i] for i in live])
        obs, _, _, _, info = env.step(action)
        film.append(obs["image"][:c.film])
    return info["success"], info["family"], np.stack(film, 1), obs["instruction"]


def share(success):
    """Successes bool [n] -> percentage and its binomial standard error"""
    p, n = float(np.mean(success)), len(success)
    return {"success": round(100 * p, 2), "se": round(100 * (p * (1 - p) / n) ** 0.5, 2), "n": n}


def evaluate(c):
    policies = open_policies(c.policies)
    splits = c.splits.split(",")
    with common.refuse("rollouts"):
        for split in splits:
            tabletop.TableTop(1, c.embodiment, c.look, split)
        Path(c.out).mkdir(parents=True, exist_ok=True)
    arms, films, began = {}, [], time.time()
    for name, policy in policies.items():
        arms[name] = {}
        for split in splits:
            success, family = [], []
            for first in range(0, c.episodes, c.batch):
                count = min(c.batch, c.episodes - first)
                won, families, film, said = rollout(policy, c, split, first, count)
                success, family = success + list(won), family + families
                if first == 0 and split == splits[0]:
                    films.append((name, film, said, won))
            arms[name][split] = share(success) | {"families": {
                f: share([s for s, g in zip(success, family) if g == f])
                for f in tabletop.FAMILIES if f in family}}
            row = arms[name][split]
            print(f"{name} {split}: {row['success']:.1f} +- {row['se']:.1f} % of {row['n']}",
                  flush=True)
    out = Path(c.out)
    results = {"arms": arms, "options": c.__dict__, "seconds": round(time.time() - began, 1)}
    files = [out / "results.json", out / "results.md"]
    common.write_atomically(files[0], json.dumps(results, indent=1) + "\n")
    text = markdown([arms])
    common.write_atomically(files[1], text)
    print(text, end="")
    if c.film:
        draw_film(films, out / "rollouts.gif")
        files.append(out / "rollouts.gif")
    print("wrote", ", ".join(map(str, files)))


def markdown(runs):
    """Results of one or more seeds, [{arm: {split: row}}], as a table: success % and, of one seed,
    its binomial standard error and the families; of several, the standard error of their mean"""
    families = tabletop.FAMILIES if len(runs) == 1 else ()
    first = next(iter(runs[0].values()))
    columns = [(s, f) for s in first for f in (None, *families)]
    def cell(arm, split, family):
        rows = [run[arm][split] if family is None else run[arm][split]["families"].get(family)
                for run in runs]
        if None in rows:
            return "-"
        values = [row["success"] for row in rows]
        error = np.std(values, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else rows[0]["se"]
        return f"{np.mean(values):.1f} ± {error:.1f}"
    what = f"success % of {next(iter(first.values()))['n']}" + (
        f", mean of {len(runs)} seeds" if len(runs) > 1 else "")
    head = [f"{what} (± standard error)"] + [f or f"**{s}**" for s, f in columns]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join([name.replace("_", " "), *(cell(name, *c) for c in columns)]) + " |"
              for name in runs[0]]
    return "\n".join(lines) + "\n"


def draw_film(films, path, size=150, head=42):
    """An animated GIF: one row a policy, a few rollouts side by side, the instruction above each"""
    count, length = films[0][1].shape[0], max(film.shape[1] for _, film, _, _ in films)
    width, height = count * (size + 4) + 4, len(films) * (size + head)
    pages = []
    for t in range(length + 5):  # hold the last picture for a second
        page = Image.new("RGB", (width, height), "white")
        pen = ImageDraw.Draw(page)
        for r, (name, film, said, won) in enumerate(films):
            for i in range(count):
                x, y = 4 + i * (size + 4), r * (size + head)
                over = t >= film.shape[1] - 1
                pen.text((x, y + 1), f"{name}" + (": success" if over and won[i] else ": failed"
                                                  if over else ""), fill="black")
                pen.text((x, y + 12), "\n".join(textwrap.wrap(said[i], 24)), fill="black")
                frame = Image.fromarray(film[i, min(t, film.shape[1] - 1)])
                page.paste(frame.resize((size, size), Image.BICUBIC), (x, y + head))
        pages.append(page.quantize(128))
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=200, loop=0)


# ------------------------------------------------------------------------ several seeds

@dataclass(kw_only=True)
class TableConfig:
    results: str  # results.json files of the seeds, comma separated
    out: str  # Markdown file to write


def table(c):
    """Mean success over seeds"""
    with common.refuse(f"--results {c.results}: not results for the same arms and splits",
                       (OSError, ValueError, LookupError, TypeError, StopIteration)):
        runs = [json.loads(Path(path).read_text())["arms"] for path in c.results.split(",")]
        text = markdown(runs)
    common.write_atomically(c.out, text)
    print(text + f"wrote {c.out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["table"]:
        table(common.parse_options(TableConfig, sys.argv[2:], usage="evaluate.py table")[0])
    else:
        evaluate(common.parse_options(EvaluateConfig, sys.argv[1:],
                                      usage="evaluate.py [options]")[0])
