"""Charts of runs and results, as the README shows them (docs/pictures.md).  They need matplotlib.

python -m analysis.charts losses --run runs/demo --out docs/losses.png
python -m analysis.charts arms --table docs/results.md --out docs/arms.png
python -m analysis.charts embodiments --data data/tabletop data/human --out docs/embodiments.png
"""

import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import common
import data
from common import option

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colors of docs/pipeline.svg and docs/token_row.svg
PURPLE, GREEN, ORANGE, BLUE = "#8256b5", "#3f8f4a", "#d98324", "#5b86b8"
DARK, GRAY, LIGHT = "#333333", "#8a8f98", "#d5d9e0"


@contextmanager
def new_figure(out: str, width: float, height: float) -> Iterator["Figure"]:
    """An empty figure of width x height inches, written as a PNG of 200 dots per inch to `out` when
    the block ends.  Exits with code 2 and one line without matplotlib, or if `out` cannot be
    written."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        common.fail("charts are drawn with matplotlib: pip install matplotlib")
    style = {
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GRAY,
        "axes.labelcolor": DARK,
        "xtick.color": DARK,
        "ytick.color": DARK,
        "legend.frameon": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with common.refuse(f"{out}: not written"), common.atomically(out) as draft:
            figure.savefig(draft, format="png", dpi=200, metadata={"Software": None})
    print(f"wrote {out}")


# ------------------------------------------------------------------------ losses
@dataclass(kw_only=True)
class LossesOptions:
    run: str = option(help="folder of a full run, e.g. runs/demo")
    out: str = option(help="PNG to write")


def read_log(run: Path) -> dict[str, np.ndarray]:
    """metrics.jsonl of a stage's run -> {name: one number per logged step}, the names of its first
    line.  Exits with code 2 and one line where there is no such log."""
    path = run / "metrics.jsonl"
    with common.refuse(f"{path}: no log of a run", (OSError, ValueError, LookupError, TypeError)):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def vocabulary_size(run: Path, name: str) -> int:
    """How many answers a finished stage's head tells apart: latent_vocab or action_vocab of its
    config.json.  Exits with code 2 and one line where it has none."""
    path = common.latest(run) / "config.json"
    with common.refuse(f"{path}: no checkpoint", (OSError, ValueError, LookupError, TypeError)):
        return int(json.loads(path.read_text(encoding="utf-8"))["model"][name])


def mark_uniform_guess(axes: "Axes", size: int, what: str) -> None:
    """A dashed line at ln(size), the cross entropy of a uniform guess among `size` answers"""
    level = math.log(size)
    axes.axhline(level, color=GRAY, linestyle="--", linewidth=1)
    axes.annotate(
        f"uniform guess among {size} {what}",
        (0.98, level),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=DARK,
        fontsize=8.5,
    )


def draw_losses(options: LossesOptions) -> None:
    """Losses of the three stages over their steps, side by side"""
    run = Path(options.run)
    logs = {stage: read_log(run / stage) for stage in ("quantize", "pretrain", "finetune")}
    if (run / "scratch").is_dir():
        logs["scratch"] = read_log(run / "scratch")
    codes = vocabulary_size(run / "pretrain", "latent_vocab")
    bins = vocabulary_size(run / "finetune", "action_vocab")
    with new_figure(options.out, 8, 2.9) as figure:
        quantize, pretrain, finetune = figure.subplots(1, 3)
        log = logs["quantize"]
        quantize.plot(log["step"], 1000 * log["loss"], "o-", color=ORANGE, markersize=3)
        quantize.set(title="1 quantize", ylabel="squared error of a pixel, x 1000")
        quantize.set_ylim(bottom=0)

        log = logs["pretrain"]
        pretrain.plot(log["step"], log["loss"], color=LIGHT, label="training batch")
        if "val_loss" in log:
            pretrain.plot(log["step"], log["val_loss"], color=PURPLE, label="held-out videos")
        pretrain.set(title="2 pretrain", ylabel="cross entropy of the codes")
        mark_uniform_guess(pretrain, codes, "codes")
        pretrain.set_ylim(0, 1.12 * math.log(codes))
        pretrain.legend(loc="lower right")

        for stage, name, color in (("finetune", "LAPA", PURPLE), ("scratch", "SCRATCH", GRAY)):
            if stage in logs:
                log = logs[stage]
                finetune.plot(log["step"], log["loss"], "o-", color=color, label=name, markersize=3)
        finetune.set(title="3 finetune", ylabel="cross entropy of the actions")
        mark_uniform_guess(finetune, bins, "bins")
        finetune.set_ylim(top=math.log(bins) + 0.13)
        finetune.legend(loc="lower left")
        for axes in (quantize, pretrain, finetune):
            axes.set_xlabel("step")
            axes.set_xlim(left=0)


# ------------------------------------------------------------------------ arms
@dataclass(kw_only=True)
class ArmsOptions:
    table: str = option(help="Markdown file with a table of `evaluate.py table` or `make table`")
    out: str = option(help="PNG to write")


class Success(NamedTuple):
    """A success rate and its standard error, in percent"""

    rate: float
    error: float


ARM_LABELS = {  # what each arm predicted before it was finetuned (docs/results.md, "The arms")
    "RANDOM": "moves at\nrandom",
    "SCRATCH": "finetuned\nonly",
    "LAPA": "latent\nactions",
    "VPT": "guessed\nactions",
    "ACTIONVLA": "true\nactions",
}
ARM_COLORS = {"LAPA": PURPLE, "VPT": BLUE, "ACTIONVLA": GREEN}


def read_success_table(path: str) -> tuple[str, dict[str, dict[str, Success]]]:
    """The first table of success rates in a Markdown file, as evaluate.py writes it: one row per
    arm, one column in bold per split, cells "41.2 ± 2.6".  Columns of task families are left out.
    -> what the numbers are, and {arm: {split: Success}}.  Exits with code 2 and one line where
    there is no such table."""
    with common.refuse(f"{path}: no table of success rates", (OSError, ValueError, LookupError)):
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        starts = [i for i, line in enumerate(lines) if line.startswith("| success % of")]
        if not starts:
            raise ValueError("expected a line that begins with '| success % of'")
        heading, *names = split_row(lines[starts[0]])
        splits = {name.strip("*"): at for at, name in enumerate(names) if name.startswith("**")}
        arms = {}
        for line in lines[starts[0] + 2 :]:
            if not line.startswith("|"):
                break
            arm, *cells = split_row(line)
            numbers = {split: cells[at].split(" ± ") for split, at in splits.items()}
            arms[arm] = {
                split: Success(float(rate), float(error))
                for split, (rate, error) in numbers.items()
            }
        if not (splits and arms):
            raise ValueError("expected splits in bold and one row per arm")
    return heading, arms


def split_row(line: str) -> list[str]:
    """ "| a | b |" -> ["a", "b"]"""
    return [cell.strip() for cell in line.strip("|").split("|")]


def place_arms(arms: list[str]) -> dict[str, float]:
    """Where each arm's bars are: one unit apart, with a gap before arms of another kind of video
    (none, robot videos, human videos)"""
    places = {}
    at = 0.0
    for before, arm in zip([arms[0], *arms], arms, strict=False):
        at += 0.5 * (videos_of(before) != videos_of(arm))
        places[arm] = at
        at += 1
    return places


def videos_of(arm: str) -> str:
    """What an arm saw before finetuning, from its name in baselines/compare.sh"""
    if arm in ("RANDOM", "SCRATCH"):
        return "no videos"
    return "human videos" if arm.endswith(" human") else "robot videos"


def draw_bars(axes: "Axes", arms: dict[str, dict[str, Success]], places: dict[str, float]) -> None:
    """One bar per arm and split, unseen instructions paler, with its standard error and number"""
    splits = list(next(iter(arms.values())))
    width = 0.8 / len(splits)
    for arm, by_split in arms.items():
        color = ARM_COLORS.get(arm.removesuffix(" human"), GRAY)
        for i, split in enumerate(splits):
            x = places[arm] + (i - (len(splits) - 1) / 2) * width
            rate, error = by_split[split]
            label = f"{split} instructions" if arm == next(iter(arms)) else None
            axes.bar(x, rate, 0.94 * width, color=color, alpha=0.5**i, label=label)
            axes.errorbar(x, rate, error, color=DARK, linewidth=1, capsize=3)
            axes.text(x, rate + error + 0.8, f"{rate:.1f}", ha="center", fontsize=8.5)


def draw_arms(options: ArmsOptions) -> None:
    """Success rates of the arms as bars with standard errors"""
    heading, arms = read_success_table(options.table)
    places = place_arms(list(arms))
    top = 6 + max(rate + error for by_split in arms.values() for rate, error in by_split.values())
    with new_figure(options.out, 8, 3.5) as figure:
        axes = figure.subplots()
        draw_bars(axes, arms, places)
        for videos in dict.fromkeys(map(videos_of, arms)):  # a line over the arms of a kind
            group = [places[arm] for arm in arms if videos_of(arm) == videos]
            axes.plot([group[0] - 0.42, group[-1] + 0.42], [top, top], color=GRAY, linewidth=1)
            axes.text(np.mean(group), top + 1, videos, ha="center", fontweight="bold")
        names = [arm.removesuffix(" human") for arm in arms]
        labels = [f"{name}\n{ARM_LABELS.get(name, '')}" for name in names]
        axes.set_xticks(list(places.values()), labels)
        axes.tick_params(axis="x", length=0)
        axes.set(ylim=(0, top + 5), ylabel=textwrap.fill(heading, 32))
        axes.legend(loc="center left")


# ------------------------------------------------------------------------ embodiments
@dataclass(kw_only=True)
class EmbodimentsOptions:
    data: list = option(help="dataset folders, one row of pictures each")
    out: str = option(help="PNG to write")
    instruction: str = option("push the green triangle to the top right corner", "of the episodes")
    frames: int = option(6, "of each episode, evenly spaced from the first to the last")
    size: int = option(64, "pixels that frames are read at")


def draw_embodiments(options: EmbodimentsOptions) -> None:
    """The first episode with the instruction in each dataset, one row of frames each"""
    where = f"instruction={json.dumps(options.instruction)}"
    episodes = [data.open_dataset(path, options.size, where).episodes[0] for path in options.data]
    with new_figure(options.out, 8, 0.4 + 1.5 * len(episodes)) as figure:
        figure.suptitle(f"“{options.instruction}”", fontweight="bold", fontsize=10.5)
        grid = figure.subplots(len(episodes), options.frames, squeeze=False)
        for path, episode, row in zip(options.data, episodes, grid, strict=True):
            shown = np.linspace(0, len(episode.frames) - 1, options.frames).round().astype(int)
            row[0].set_ylabel(episode.info.get("embodiment") or Path(path).name)
            for axes, t in zip(row, shown, strict=True):
                axes.imshow(episode.frames[t], interpolation="bicubic")
                axes.set_xlabel(f"{t / episode.fps:.1f} s", fontsize=8.5)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)


COMMANDS: dict[str, tuple[type, Callable]] = {
    "losses": (LossesOptions, draw_losses),
    "arms": (ArmsOptions, draw_arms),
    "embodiments": (EmbodimentsOptions, draw_embodiments),
}


def main(words: list[str]) -> None:
    """Run the command that the first word names"""
    if not words or words[0] in ("-h", "--help"):
        print(__doc__.strip())
    elif words[0] in COMMANDS:
        options, draw = COMMANDS[words[0]]
        draw(common.parse_options(options, words[1:])[0])
    else:
        common.fail(f"{words[0]!r}: no such chart, expected one of {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main(sys.argv[1:])
