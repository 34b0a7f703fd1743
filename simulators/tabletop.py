"""A tabletop in numpy: four blocks, one effector, quasi-static pushing, pixels out.

The built-in simulator, in the spirit of Language Table (Lynch et al. 2022, arXiv 2210.06407).
Everything is vectorized over B tables.

    env = TableTop(batch=2)
    obs, info = env.reset(seed=0)              # obs["image"] uint8 [2, 64, 64, 3]
    while not env.done.all():
        obs, reward, terminated, truncated, info = env.step(env.expert())

The table is the unit square, x to the right and y down as in the picture.  Actions are float [B, 2]
in [-1, 1]: the wanted displacement of the effector in units of the embodiment's speed.  Blocks are
disks for contact, whatever their looks, and do not turn.  A finished table stays as it is.

    python -m simulators.tabletop OUT          # a dataset of its expert's episodes"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import atomically, fail, option, parse_options, refuse, to_json
from model import ACTION, LATENT
from sequences import TAGS, train_tokenizer
from simulators import Info, Observation

BLOCKS = ("red circle", "blue square", "green triangle", "yellow star")
COLORS = ((214, 62, 58), (58, 108, 208), (62, 158, 84), (236, 186, 52))  # of the blocks
THINGS = ("tip", *BLOCKS)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PLACES = {
    "left side": (0, np.nan),
    "right side": (1, np.nan),
    "top side": (np.nan, 0),
    "bottom side": (np.nan, 1),
    "top left corner": (0, 0),
    "top right corner": (1, 0),
    "bottom left corner": (0, 1),
    "bottom right corner": (1, 1),
}
PHRASES = {
    "reach": ["move to the {}"],
    "push": ["push the {} " + d for d in DIRECTIONS],
    "place": ["push the {} to the " + p for p in PLACES],
    "join": ["push the {} to the " + b for b in BLOCKS],
}  # of each task family
FAMILIES = tuple(PHRASES)
SPEED = {"robot": 0.06, "human": 0.045}  # table widths per step at action 1
LOOKS = ("plain", "real")
FPS = 5  # steps per second, as in the Bridge dataset
CAPTION_BINS = 16  # resolution of the coordinates in scene captions

TIP_RADIUS = 0.06
BLOCK_RADIUS = 0.065
CONTACT = TIP_RADIUS + BLOCK_RADIUS  # distance of centers at which the effector touches a block
RIM = 0.115  # blocks stop this far from the edge, so that the effector can get behind them
GRIP = 0.9  # part of the effector's motion that a touched block follows; the rest may slip

# What counts as success: how far a block was pushed, or how near it is to its goal.
PUSH_DISTANCE = 0.12
SIDE_DISTANCE = 0.17
CORNER_DISTANCE = 0.28
JOIN_DISTANCE = 0.18

Task = tuple[int, int, int]  # indices of the family, the block, and the phrase in the family


def tasks(split: str = "all") -> list[Task]:
    """All (family, block, argument) combinations of a split: "seen", "unseen" or "all".

    A quarter of a family's combinations (of join, a third) is unseen: finetuning learns from no
    actions of it."""
    return [
        (f, block, argument)
        for f, family in enumerate(FAMILIES)
        for block in range(4)
        for argument in range(len(PHRASES[family]))
        if family != "join" or argument != block
        if split == "all" or ((block + argument) % 4 == 3) == (split == "unseen")
    ]


def instruction(family: int, block: int, argument: int) -> str:
    """A task in words"""
    return PHRASES[FAMILIES[family]][argument].format(BLOCKS[block])


def vocabulary() -> list[str]:
    """Every text the tabletop can produce, for training a word-level tokenizer"""
    numbers = " ".join(map(str, range(CAPTION_BINS)))
    return [instruction(*task) for task in tasks()] + [f"describe the table where is tip {numbers}"]


def _polar(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[.., 2] -> their directions [.., 2] and lengths [.., 1]"""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True) + 1e-9
    return vectors / length, length


class Goals(NamedTuple):
    """The task of each table, with places float [B, 2] as they are now"""

    family: np.ndarray  # int [B]
    argument: np.ndarray  # int [B]: which direction, place or other block
    block: np.ndarray  # the block that is to move
    start: np.ndarray  # where it began
    direction: np.ndarray  # unit vector, of a push
    place: np.ndarray  # of a place; a side has the block's own coordinate along it
    other: np.ndarray  # the block that a join is about


class Approach(NamedTuple):
    """The effector as seen from the block that is to move, [B, 2] but for the last two, [B]"""

    tip: np.ndarray
    block: np.ndarray
    ahead: np.ndarray  # unit vector from the block to where it is to go
    side: np.ndarray  # `ahead`, a quarter turn on
    offset: np.ndarray  # from the block to the effector
    forward: np.ndarray  # that offset along `ahead`: negative behind the block
    lateral: np.ndarray  # and along `side`


class TableTop:
    """A batch of tables (a simulators.Simulator).

    batch: number of tables; embodiment: "robot" (a compact gripper) or "human" (a hand with a
    thumb, other table, slower); look: "plain" or "real" (palette, wood grain and lighting drawn
    anew for each table); split: which tasks, see `tasks`; families: subset of FAMILIES;
    size: pixels; max_steps: steps until `truncated`.  Raises ValueError for other words."""

    ACTION_DIM = 2
    ACTION_LOW = -1.0
    ACTION_HIGH = 1.0
    FAMILIES = FAMILIES
    SPLITS = ("seen", "unseen")
    MAX_STEPS = 50
    OPTIONS = {"embodiment": str, "look": str}

    def __init__(
        self,
        batch: int,
        embodiment: str = "robot",
        look: str = "plain",
        split: str = "all",
        families: Sequence[str] = FAMILIES,
        size: int = 64,
        max_steps: int = MAX_STEPS,
    ) -> None:
        for value, allowed, name in (
            (embodiment, SPEED, "embodiment"),
            (look, LOOKS, "look"),
            (split, ("all", *self.SPLITS), "split"),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is one of {', '.join(allowed)}, not {value!r}")
        self.batch = batch
        self.embodiment = embodiment
        self.look = look
        self.size = size
        self.speed = SPEED[embodiment]
        self.max_steps = max_steps
        self.by_family = [
            [task for task in tasks(split) if task[0] == f]
            for f, family in enumerate(FAMILIES)
            if family in families
        ]

    # -------------------------------------------------------------- the Gymnasium interface
    def reset(self, seed: int | Sequence[int]) -> tuple[Observation, Info]:
        """-> obs, info.  The same seed gives the same tables, tasks and pixels, bit for bit."""
        self.rng = np.random.default_rng(seed)
        self.task = self._draw_tasks()
        self.instructions = [instruction(*task) for task in self.task]
        layout = self._draw_layout()
        self.tip = layout[:, 0]  # B 2
        self.blocks = layout[:, 1:]  # B 4 2
        self.start = layout[:, 1:]
        self.steps = np.zeros(self.batch, int)
        self.done = np.zeros(self.batch, bool)
        self.success = np.zeros(self.batch, bool)
        self._draw_looks()
        self.image = self.render()
        return self._observe()

    def step(
        self, action: np.ndarray
    ) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, Info]:
        """action float [B, 2], clipped to [-1, 1] -> obs, reward, terminated, truncated, info

        reward float [B] is 1 on the step that succeeds; terminated and truncated are bool [B].
        Raises ValueError for another shape or NaN."""
        action = np.asarray(action, float)
        if action.shape != (self.batch, 2) or np.isnan(action).any():
            raise ValueError(f"action must be numbers of shape ({self.batch}, 2)")
        live = ~self.done
        before = self.blocks
        motion = np.clip(action, -1, 1) * self.speed * live[:, None]
        for _ in range(4):  # sub-steps, so that a fast tip cannot jump into a block
            self._move(motion / 4)
        self.blocks = np.where(live[:, None, None], self.blocks, before)
        self.steps += live
        won = live & self._solved()
        self.success |= won
        self.done = self.success | (self.steps >= self.max_steps)
        self.image[live] = self.render(live)
        obs, info = self._observe()
        return obs, won.astype(float), self.success.copy(), self.done & ~self.success, info

    def _observe(self) -> tuple[Observation, Info]:
        """-> obs, info"""
        return {"image": self.image.copy(), "instruction": list(self.instructions)}, {
            "success": self.success.copy(),
            "family": [FAMILIES[f] for f in self.task[:, 0]],
        }

    # -------------------------------------------------------------- the start of an episode
    def _draw_tasks(self) -> np.ndarray:
        """-> int [B, 3]: families equally likely, then the tasks of a family"""
        family = self.rng.integers(len(self.by_family), size=self.batch)
        return np.array([self.rng.choice(self.by_family[f]) for f in family])

    def _draw_layout(self) -> np.ndarray:
        """-> float [B, 5, 2], the effector and the blocks: one thing after another, each at the
        first of 40 random spots that touches nothing so far (or at the one with most room)"""
        rows = np.arange(self.batch)
        layout = np.zeros((self.batch, 0, 2))
        for margin in (0.1, 0.25, 0.25, 0.25, 0.25):  # the effector, then the blocks
            spots = self.rng.uniform(margin, 1 - margin, (self.batch, 40, 2))
            distance = np.linalg.norm(spots[:, :, None] - layout[:, None], axis=-1)  # B 40 things
            room = distance.min(2, initial=0.17)  # more room than 0.17 does not count
            chosen = spots[rows, room.argmax(1)]  # B 2
            layout = np.concatenate([layout, chosen[:, None]], axis=1)
        return layout

    def _draw_looks(self) -> None:
        """Draw the looks of each table: palette float [B, 4, 3] in 0..255, ground [B, S, S, 3],
        gain [B, 1, 1, 1] (the light)"""
        B, S = self.batch, self.size
        self.palette = np.tile(np.float32(COLORS), (B, 1, 1))
        base = {"robot": (206, 212, 218), "human": (222, 200, 168)}[self.embodiment]
        y, x = np.mgrid[0:S, 0:S].astype(np.float32) / S
        self.ground = np.tile(np.float32(base), (B, S, S, 1))
        if self.embodiment == "human":  # planks
            self.ground[:, y % 0.25 < 1 / S] *= 0.9
        self.gain = np.ones((B, 1, 1, 1), np.float32)
        if self.look == "real":
            self._draw_real_looks(x, y)

    def _draw_real_looks(self, x: np.ndarray, y: np.ndarray) -> None:
        """The same, drawn anew for each table: colors, the tint and the waves of the grain, a lamp
        from some side, the light.  x, y: float [S, S] coordinates of the pixels"""
        B = self.batch

        def uniform(*shape: int) -> np.ndarray:
            return self.rng.uniform(-1, 1, shape).astype(np.float32)

        self.palette = np.clip(self.palette + 28 * uniform(B, 4, 3), 0, 255)
        phase = 12 * x[None] * (1 + uniform(B, 1, 1)) + 12 * y[None] * uniform(B, 1, 1)
        tint = np.float32((184, 150, 116)) + 26 * uniform(B, 1, 1, 3)
        lamp = 1 + 0.15 * (uniform(B, 1, 1) * (x - 0.5) + uniform(B, 1, 1) * (y - 0.5))
        self.ground = tint * ((1 + 0.05 * np.sin(phase)) * lamp)[..., None]
        self.gain = 1 + 0.12 * uniform(B, 1, 1, 1)

    # -------------------------------------------------------------- physics and success
    def _move(self, motion: np.ndarray) -> None:
        """Move the effectors by motion [B, 2] and the blocks that they touch"""
        before = self.tip
        self.tip = np.clip(self.tip + motion, 0, 1)
        motion = (self.tip - before)[:, None]
        normal, distance = _polar(self.blocks - self.tip[:, None])  # B 4 2, B 4 1
        towards = (normal * motion).sum(-1, keepdims=True) > 0
        blocks = self.blocks + GRIP * motion * ((distance < CONTACT) & towards)
        for _ in range(2):  # dragged once; now resolve overlaps with the tip and among blocks
            normal, distance = _polar(blocks - self.tip[:, None])
            blocks = blocks + normal * np.maximum(CONTACT - distance, 0)
            normal, distance = _polar(blocks[:, :, None] - blocks[:, None])  # B 4 4 2, B 4 4 1
            overlap = np.maximum(2 * BLOCK_RADIUS - distance, 0)
            blocks = np.clip(blocks + (normal * overlap / 2).sum(2), RIM, 1 - RIM)
        self.blocks = blocks

    def _goals(self) -> Goals:
        rows = np.arange(self.batch)
        family, moved, argument = self.task.T
        block = self.blocks[rows, moved]
        place = np.array(list(PLACES.values()))[argument % 8]
        return Goals(
            family=family,
            argument=argument,
            block=block,
            start=self.start[rows, moved],
            direction=np.array(list(DIRECTIONS.values()))[argument % 4],
            place=np.where(np.isnan(place), block, place),
            other=self.blocks[rows, argument % 4],
        )

    def _solved(self) -> np.ndarray:
        """-> bool [B]: whether each task is fulfilled as things stand now"""
        goals = self._goals()
        reach = np.linalg.norm(goals.block - self.tip, axis=-1) < CONTACT + 0.02
        # A push counts when the block went far enough, and less far to the side than ahead.
        moved = goals.block - goals.start
        along = (moved * goals.direction).sum(-1)
        aside = np.abs(moved - along[:, None] * goals.direction).sum(-1)
        push = (along > PUSH_DISTANCE) & (aside < along)
        near = np.where(goals.argument % 8 < 4, SIDE_DISTANCE, CORNER_DISTANCE)
        place = np.linalg.norm(goals.block - goals.place, axis=-1) < near
        join = np.linalg.norm(goals.block - goals.other, axis=-1) < JOIN_DISTANCE
        return np.choose(goals.family, (reach, push, place, join))

    # -------------------------------------------------------------- the scripted policy
    def expert(self, noise: float = 0.0) -> np.ndarray:
        """A scripted policy's next action [B, 2]: get behind the block, then push.

        noise: standard deviation added to it, drawn from the tables' own generator"""
        goals = self._goals()
        view = self._approach(goals)
        behind, blocked = _way_behind(view)
        ready = (view.forward < -0.04) & (np.abs(view.lateral) < 0.03)
        # Straight to the spot behind the block, unless one of these comes first.
        cases = [case[:, None] for case in (goals.family == 0, ready, blocked)]
        ways = [-view.offset, _push(view, self.speed), _way_around(view, self.speed)]
        action = np.select(cases, ways, behind) / self.speed
        action /= np.maximum(np.linalg.norm(action, axis=-1, keepdims=True), 1)
        return np.clip(action + noise * self.rng.standard_normal(action.shape), -1, 1)

    def _approach(self, goals: Goals) -> Approach:
        """Put the origin into the block and turn the axes toward its goal"""
        ends = (goals.block, goals.start + 0.3 * goals.direction, goals.place, goals.other)
        ahead, _ = _polar(np.choose(goals.family[:, None], ends) - goals.block)
        side = ahead[:, ::-1] * (-1, 1)  # a quarter turn
        offset = self.tip - goals.block
        return Approach(
            tip=self.tip,
            block=goals.block,
            ahead=ahead,
            side=side,
            offset=offset,
            forward=(offset * ahead).sum(-1),
            lateral=(offset * side).sum(-1),
        )

    # -------------------------------------------------------------- words and pixels
    def captions(self, rng: np.random.Generator) -> list[str]:
        """What a vision-language model would say of each table: names and places in random order"""
        places = [self.locate(thing) for thing in THINGS]
        return [
            " ".join(f"{THINGS[i].split()[0]} {where[i]}" for i in rng.permutation(len(THINGS)))
            for where in zip(*places, strict=True)
        ]

    def locate(self, thing: str) -> list[str]:
        """Where a thing (of THINGS) is on each table, in words: "3 12" """
        spot = self.tip if thing == "tip" else self.blocks[:, BLOCKS.index(thing)]
        return [f"{x} {y}" for x, y in (spot.clip(0, 0.999) * CAPTION_BINS).astype(int)]

    def render(self, tables: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Some tables (an index; default all) -> uint8 [B, S, S, 3], edges anti-aliased"""
        canvas = self.ground[tables].copy()
        tip = self.tip[tables].astype(np.float32)
        _paint_blocks(canvas, self.blocks[tables].astype(np.float32), self.palette[tables])
        _paint(canvas, tip + 0.015, circle(TIP_RADIUS + 0.01), 0.0, 0.25)  # its shadow
        if self.embodiment == "robot":
            _paint_gripper(canvas, tip)
        else:
            _paint_hand(canvas, tip)
        return np.clip(canvas * self.gain[tables], 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------ ways of the expert
def _push(view: Approach, speed: float) -> np.ndarray:
    """A step ahead, [B, 2], that also corrects most of the lateral error"""
    return view.ahead * speed - view.side * view.lateral[:, None] * 0.8


def _way_behind(view: Approach) -> tuple[np.ndarray, np.ndarray]:
    """-> the path [B, 2] to the spot behind the block, and bool [B]: the block is in the way.

    The point of the way that is nearest to the block is the foot of the perpendicular from the
    block's center: at this part of the way, kept within its ends."""
    way = view.block - view.ahead * (CONTACT + 0.01) - view.tip
    part = (-view.offset * way).sum(-1) / ((way * way).sum(-1) + 1e-9)
    nearest = np.linalg.norm(view.offset + np.clip(part, 0, 1)[:, None] * way, axis=-1)
    return way, nearest < CONTACT - 0.01


def _way_around(view: Approach, speed: float) -> np.ndarray:
    """A step [B, 2] on a circle around the block: along the tangent, on the side where the
    effector is, and back onto the circle, a little wider than contact"""
    outward, radius = _polar(view.offset)

    def has_room(sign: np.ndarray) -> np.ndarray:
        """bool [B, 1]: the effector beside the block, on that side, would be on the table"""
        beside = view.block + sign * view.side * CONTACT
        return np.abs(beside - 0.5).max(-1, keepdims=True) < 0.5

    turn = np.where(view.lateral >= 0, 1.0, -1.0)[:, None]
    turn = np.where(has_room(turn) | ~has_room(-turn), turn, -turn)  # not between block and edge
    tangent = speed * turn * outward[:, ::-1] * (-1, 1)
    return tangent + outward * (CONTACT + 0.03 - radius)


# ------------------------------------------------------------------------ painting
# The outline of a shape: dx, dy float [B, w, w] from its center, in table widths -> the distance
# inside its edge, negative outside.
Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]


def circle(radius: float) -> Outline:
    def outline(dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
        return radius - np.hypot(dx, dy)

    return outline


def square(dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    return 0.87 * BLOCK_RADIUS - np.maximum(np.abs(dx), np.abs(dy))


def triangle(dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    return np.minimum(0.045 - dy, 0.045 + 0.5 * dy - 0.866 * np.abs(dx))


def star(dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    return BLOCK_RADIUS * (0.86 + 0.3 * np.cos(5 * np.arctan2(dx, -dy))) - np.hypot(dx, dy)


def thumb(dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """A bar with round ends from the center down to the right"""
    along = np.clip((dx + dy) / 2, 0, 0.05)
    return 0.03 - np.hypot(dx - along, dy - along)


def smaller(outline: Outline, by: float) -> Outline:
    """The same shape, its edge moved inward"""

    def inner(dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
        return outline(dx, dy) - by

    return inner


OUTLINES = (circle(BLOCK_RADIUS), square, triangle, star)  # of the blocks


def _paint(
    canvas: np.ndarray,
    center: np.ndarray,
    outline: Outline,
    color: np.ndarray | float,
    alpha: float = 1.0,
    reach: float = 0.1,
) -> None:
    """Blend a color into canvas float [B, S, S, 3] inside an outline around center [B, 2].

    The cover of a pixel grows from 0 to 1 across the pixel that the edge runs through.  Only a
    window of `reach` around the center can change, so no more is computed."""
    S = canvas.shape[1]
    pixel = ((np.arange(S) + 0.5) / S).astype(np.float32)  # coordinates of the pixels' centers
    w = min(S, int(2 * reach * S) + 2)
    x, y = np.clip((center.T - reach) * S, 0, S - w).astype(int)[..., None] + np.arange(w)  # B w
    window = np.arange(len(canvas))[:, None, None], y[:, :, None], x[:, None, :]
    dx = pixel[x][:, None, :] - center[:, 0, None, None]  # B 1 w
    dy = pixel[y][:, :, None] - center[:, 1, None, None]  # B w 1
    cover = (alpha * np.clip(0.5 + S * outline(dx, dy), 0, 1))[..., None]  # B w w 1
    under = canvas[window]
    canvas[window] = under + cover * (color - under)


def _paint_blocks(canvas: np.ndarray, blocks: np.ndarray, palette: np.ndarray) -> None:
    """Soft shadows first, then blocks [B, 4, 2] in a darker and their own color [B, 4, 3]"""
    colors = palette[:, :, None, None]  # B 4 1 1 3
    for i in range(4):
        _paint(canvas, blocks[:, i] + 0.015, circle(BLOCK_RADIUS + 0.01), 0.0, 0.22)
    for i, outline in enumerate(OUTLINES):
        _paint(canvas, blocks[:, i], outline, 0.72 * colors[:, i])
        _paint(canvas, blocks[:, i], smaller(outline, 0.014), colors[:, i])


def _paint_gripper(canvas: np.ndarray, tip: np.ndarray) -> None:
    """A dark ring with a bright center"""
    _paint(canvas, tip, circle(TIP_RADIUS + 0.015), np.float32((38, 40, 48)))
    _paint(canvas, tip, circle(TIP_RADIUS - 0.034), np.float32((236, 238, 242)))


def _paint_hand(canvas: np.ndarray, tip: np.ndarray) -> None:
    """A fist and its thumb"""
    skin = np.float32((112, 72, 52))
    _paint(canvas, tip, thumb, 0.86 * skin)
    _paint(canvas, tip, circle(TIP_RADIUS + 0.012), 0.8 * skin)
    _paint(canvas, tip, circle(TIP_RADIUS - 0.002), skin)


SIMULATOR = TableTop


# ------------------------------------------------------------------------ datasets
@dataclass
class TabletopOptions:
    out: str = option(help="folder to write")
    episodes: int = option(2000, "scripted episodes to record")
    embodiment: str = option("robot", "robot or human")
    look: str = option("plain", "plain or real (random colors, wood grain and light per episode)")
    tasks: str = option("all", "all, seen or unseen instructions")
    noise: float = option(0.1, "standard deviation of noise added to the expert's actions")
    scenes: int = option(0, "instead of episodes: that many still scenes with captions")
    size: int = option(64, "pixels")
    seed: int = option(0, "of tables and tasks")


def play(env: TableTop, seed: Sequence[int], noise: float) -> tuple[np.ndarray, np.ndarray]:
    """The expert on every table -> pictures uint8 [B, T+1, S, S, 3], actions float32 [B, T, 2]"""
    images = [env.reset(seed)[0]["image"]]
    actions = []
    while not env.done.all():
        actions.append(env.expert(noise))
        images.append(env.step(actions[-1])[0]["image"])
    return np.stack(images, 1), np.stack(actions, 1).astype(np.float32)


def record(options: TabletopOptions, folder: Path) -> Iterator[dict]:
    """Record the scripted expert; failures are dropped: every video shows its instruction.
    -> rows of episodes.jsonl.  Raises ValueError where the expert fails too often."""
    unseen = set(tasks("unseen"))
    kept = 0
    for part in range(-(-options.episodes // 250) + 1):
        env = TableTop(250, options.embodiment, options.look, options.tasks, size=options.size)
        images, actions = play(env, (options.seed, part), options.noise)
        for b in np.flatnonzero(env.success):
            name = f"{options.embodiment}_{kept:05d}"
            frames = env.steps[b] + 1
            np.save(folder / "videos" / f"{name}.npy", images[b, :frames])
            np.save(folder / "actions" / f"{name}.npy", actions[b, : frames - 1])
            yield {
                "id": name,
                "instruction": env.instructions[b],
                "video": f"videos/{name}.npy",
                "fps": FPS,
                "frames": int(frames),
                "actions": f"actions/{name}.npy",
                "task": FAMILIES[env.task[b, 0]],
                "embodiment": options.embodiment,
                "combination": "unseen" if tuple(env.task[b]) in unseen else "seen",
            }
            kept += 1
            if kept == options.episodes:
                return
    raise ValueError(
        f"--noise {options.noise}: the expert reached {kept} of {options.episodes} goals"
    )


def scenes(
    options: TabletopOptions, folder: Path, tags: Sequence[tuple[str, str]]
) -> Iterator[dict]:
    """Still scenes, 100 to a video: what a pretrained vision-language model knows.  Each video is
    an episode that describes the table and, for each thing on it, one that says where it is, in
    these pairs of tags by turns.  -> rows of episodes.jsonl"""
    parts = -(-options.scenes // 100)
    for part in range(parts):
        embodiment = ("robot", "human")[part % 2]
        opening, closing = tags[part // 2 % 2]
        env = TableTop(100, embodiment, options.look, size=options.size)
        video = f"videos/scene_{part:05d}.npy"
        np.save(folder / video, env.reset((options.seed, part))[0]["image"])
        rng = np.random.default_rng((options.seed, part))
        said = {"describe the table": env.captions(rng)}
        for thing in THINGS:
            said[f"where is the {thing}"] = [f"{opening} {x} {closing}" for x in env.locate(thing)]
        for i, (question, captions) in enumerate(said.items()):
            yield {
                "id": f"scene_{part:05d}_{i}",
                "instruction": question,
                "video": video,
                "fps": 1,
                "frames": 100,
                "embodiment": embodiment,
                "captions": captions,
                "task": "locate" if i else "describe",
                "split": "val" if 0 < part >= parts - 2 else "train",
            }


def make_tabletop(options: TabletopOptions) -> None:
    """Write the built-in dataset: whole, or not at all."""
    out = Path(options.out)
    if out.exists():
        fail(f"{out} exists: remove it or choose another folder")
    with refuse(f"{out}"), atomically(out) as draft:
        for name in ("videos", "actions"):
            (draft / name).mkdir(parents=True)
        rows = list(
            scenes(options, draft, (TAGS[LATENT], TAGS[ACTION]))
            if options.scenes
            else record(options, draft)
        )
        lines = "".join(to_json(row) + "\n" for row in rows)
        (draft / "episodes.jsonl").write_text(lines, encoding="utf-8")
        words = train_tokenizer(vocabulary()).to_str()
        (draft / "tokenizer.json").write_text(words, encoding="utf-8")
    videos = {row["video"]: row["frames"] for row in rows}
    print(f"wrote {out}: {len(rows)} episodes, {sum(videos.values())} frames")


if __name__ == "__main__":
    make_tabletop(parse_options(TabletopOptions, sys.argv[1:], positional=("out",))[0])
