"""A table top in numpy: four blocks, one effector, quasi-static pushing, pixels out.

The built-in simulator, in the spirit of Language Table.  Everything is vectorised over B tables.

    env = TableTop(batch=2)
    obs, info = env.reset(seed=0)              # obs["image"] uint8 [2, 64, 64, 3]
    while not env.done.all():
        obs, reward, terminated, truncated, info = env.step(env.expert())

The table is the unit square, x to the right and y down as in the picture.  Actions are float [B, 2]
in [-1, 1]: the wanted displacement of the effector in units of the embodiment's speed.  Blocks are
discs for contact, whatever their looks, and do not turn.  A finished table stays as it is."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import atomically, fail, parse_options, refuse, to_json
from model import ACTION, LATENT
from sequences import TAGS, train_tokenizer

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
SPEED = {"robot": 0.06, "human": 0.045}  # table widths a step at action 1
FPS = 5  # steps a second, as Bridge
CAPTION_BINS = 16  # resolution of the coordinates in scene captions

TIP_RADIUS, BLOCK_RADIUS = 0.06, 0.065
CONTACT = TIP_RADIUS + BLOCK_RADIUS
RIM = 0.115  # blocks stop this far from the edge, so that the effector can get behind them
GRIP = 0.9  # share of the effector's motion that a touched block follows; the rest may slip
PUSH_DISTANCE, SIDE, CORNER, JOIN = 0.12, 0.17, 0.28, 0.18  # what counts as success


def tasks(split="all"):
    """All (family, block, argument) combinations of a split: "seen", "unseen" or "all".

    A quarter of a family's combinations (of join, a third) is unseen: never in the labelled few."""
    return [
        (f, block, argument)
        for f, family in enumerate(FAMILIES)
        for block in range(4)
        for argument in range(len(PHRASES[family]))
        if family != "join" or argument != block
        if split == "all" or ((block + argument) % 4 == 3) == (split == "unseen")
    ]


def instruction(family, block, argument):
    return PHRASES[FAMILIES[family]][argument].format(BLOCKS[block])


def vocabulary():
    """Every text the table top can produce, for training a word-level tokenizer"""
    numbers = " ".join(map(str, range(CAPTION_BINS)))
    return [instruction(*task) for task in tasks()] + [f"describe the table where is tip {numbers}"]


def _polar(vectors):
    """[.., 2] -> their directions [.., 2] and lengths [.., 1]"""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True) + 1e-9
    return vectors / length, length


class TableTop:
    """A batch of tables.

    batch: number of tables; embodiment: "robot" (a compact gripper) or "human" (a hand with a
    thumb, other table, slower); look: "plain" or "real" (palette, wood grain and lighting drawn
    anew for each table); split: which tasks, see `tasks`; families: subset of FAMILIES;
    size: pixels; max_steps: steps until `truncated`."""

    def __init__(
        self,
        batch,
        embodiment="robot",
        look="plain",
        split="all",
        families=FAMILIES,
        size=64,
        max_steps=50,
    ):
        for value, allowed, name in (
            (embodiment, SPEED, "embodiment"),
            (look, ("plain", "real"), "look"),
            (split, ("all", "seen", "unseen"), "split"),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is one of {', '.join(allowed)}, not {value!r}")
        self.batch, self.embodiment, self.look, self.size = batch, embodiment, look, size
        self.speed, self.max_steps = SPEED[embodiment], max_steps
        self.by_family = [
            [task for task in tasks(split) if task[0] == f]
            for f, family in enumerate(FAMILIES)
            if family in families
        ]

    # -------------------------------------------------------------- the Gymnasium interface
    def reset(self, seed):
        """-> obs, info.  The same seed gives the same tables, tasks and pixels, bit for bit."""
        B = self.batch
        self.rng = rng = np.random.default_rng(seed)
        family = rng.integers(len(self.by_family), size=B)
        self.task = np.array([rng.choice(self.by_family[f]) for f in family])  # B 3
        self.instructions = [instruction(*task) for task in self.task]
        # One thing after another, each at the first of 40 random spots that touches nothing so far
        # (or at the one with most room).
        layout = np.zeros((B, 0, 2))
        for margin in (0.1, 0.25, 0.25, 0.25, 0.25):  # the effector, then the blocks
            spots = rng.uniform(margin, 1 - margin, (B, 40, 2))
            gap = np.linalg.norm(spots[:, :, None] - layout[:, None], axis=-1).min(2, initial=0.17)
            layout = np.concatenate([layout, spots[np.arange(B), gap.argmax(1)][:, None]], axis=1)
        self.tip, self.blocks, self.start = layout[:, 0], layout[:, 1:], layout[:, 1:]
        self.steps, self.done, self.success = np.zeros(B, int), np.zeros(B, bool), np.zeros(B, bool)
        self._dress()
        self.image = self.render()
        return self._now()

    def step(self, action):
        """action float [B, 2], clipped to [-1, 1] -> obs, reward, terminated, truncated, info

        reward float [B] is 1 on the step that succeeds; terminated and truncated are bool [B].
        Raises ValueError for another shape or NaN."""
        action = np.asarray(action, float)
        if action.shape != (self.batch, 2) or np.isnan(action).any():
            raise ValueError(f"action must be numbers of shape ({self.batch}, 2)")
        live, before = ~self.done, self.blocks
        motion = np.clip(action, -1, 1) * self.speed * live[:, None]
        for _ in range(4):  # sub-steps, so that a fast tip cannot jump into a block
            self._move(motion / 4)
        self.blocks = np.where(live[:, None, None], self.blocks, before)
        self.steps += live
        won = live & self._solved()
        self.success |= won
        self.done = self.success | (self.steps >= self.max_steps)
        self.image[live] = self.render(live)
        obs, info = self._now()
        return obs, won.astype(float), self.success.copy(), self.done & ~self.success, info

    def _now(self):
        """-> obs, info"""
        return {"image": self.image.copy(), "instruction": list(self.instructions)}, {
            "success": self.success.copy(),
            "family": [FAMILIES[f] for f in self.task[:, 0]],
        }

    # -------------------------------------------------------------- physics and success
    def _move(self, motion):
        before, self.tip = self.tip, np.clip(self.tip + motion, 0, 1)
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

    def _parts(self):
        """Of each table: family, argument, block, its start, direction, goal, the other block"""
        rows = np.arange(self.batch)
        family, moved, argument = self.task.T
        block, start = self.blocks[rows, moved], self.start[rows, moved]
        way = np.array(list(DIRECTIONS.values()))[argument % 4]
        goal = np.array(list(PLACES.values()))[argument % 8]
        goal = np.where(np.isnan(goal), block, goal)
        return family, argument, block, start, way, goal, self.blocks[rows, argument % 4]

    def _solved(self):
        family, argument, block, start, way, goal, other = self._parts()
        reach = np.linalg.norm(block - self.tip, axis=-1) < CONTACT + 0.02
        moved = block - start
        along = (moved * way).sum(-1)
        push = (along > PUSH_DISTANCE) & (np.abs(moved - along[:, None] * way).sum(-1) < along)
        place = np.linalg.norm(block - goal, axis=-1) < np.where(argument % 8 < 4, SIDE, CORNER)
        join = np.linalg.norm(block - other, axis=-1) < JOIN
        return np.choose(family, (reach, push, place, join))

    def expert(self, noise=0.0):
        """A scripted policy's next action [B, 2]: get behind the block, then push."""
        family, _, block, start, way, goal, other = self._parts()
        aim = np.choose(family[:, None], (block, start + 0.3 * way, goal, other))
        ahead, _ = _polar(aim - block)
        side = ahead[:, ::-1] * (-1, 1)  # a quarter turn
        offset = self.tip - block
        forward, lateral = (offset * ahead).sum(-1), (offset * side).sum(-1)
        ready = (forward < -0.04) & (np.abs(lateral) < 0.03)
        # Straight to the spot behind the block, unless the block is in the way: then round it.
        wish = block - ahead * (CONTACT + 0.01) - self.tip
        share = (-offset * wish).sum(-1) / ((wish * wish).sum(-1) + 1e-9)
        nearest = np.linalg.norm(offset + np.clip(share, 0, 1)[:, None] * wish, axis=-1)
        out, radius = _polar(offset)
        turn = np.where(lateral >= 0, 1.0, -1.0)[:, None]
        room = lambda sign: np.abs(block + sign * side * CONTACT - 0.5).max(-1, keepdims=True) < 0.5
        turn = np.where(room(turn) | ~room(-turn), turn, -turn)  # not between block and edge
        around = self.speed * turn * out[:, ::-1] * (-1, 1) + out * (CONTACT + 0.03 - radius)
        push = ahead * self.speed - side * lateral[:, None] * 0.8
        cases = [case[:, None] for case in (family == 0, ready, nearest < CONTACT - 0.01)]
        wish = np.select(cases, [-offset, push, around], wish) / self.speed
        wish /= np.maximum(np.linalg.norm(wish, axis=-1, keepdims=True), 1)
        return np.clip(wish + noise * self.rng.standard_normal(wish.shape), -1, 1)

    # -------------------------------------------------------------- words and pixels
    def captions(self, rng):
        """What a vision-language model would say of each table: names and places in random order"""
        return [
            " ".join(f"{THINGS[i].split()[0]} {where[i]}" for i in rng.permutation(len(THINGS)))
            for where in zip(*(self.locate(thing) for thing in THINGS))
        ]

    def locate(self, thing):
        """Where a thing (of THINGS) is on each table, in words: "3 12" """
        spot = self.tip if thing == "tip" else self.blocks[:, BLOCKS.index(thing)]
        return [f"{x} {y}" for x, y in (spot.clip(0, 0.999) * CAPTION_BINS).astype(int)]

    def _dress(self):
        """Draw the looks of each table: colours float [B, 4, 3] in 0..255, ground [B, S, S, 3]"""
        B, S, rng = self.batch, self.size, self.rng
        self.palette = np.tile(np.float32(COLORS), (B, 1, 1))
        base = {"robot": (206, 212, 218), "human": (222, 200, 168)}[self.embodiment]
        y, x = np.mgrid[0:S, 0:S].astype(np.float32) / S
        self.ground = np.tile(np.float32(base), (B, S, S, 1))
        if self.embodiment == "human":  # planks
            self.ground[:, y % 0.25 < 1 / S] *= 0.9
        self.gain = np.ones((B, 1, 1, 1), np.float32)
        if self.look == "real":
            u = lambda *shape: rng.uniform(-1, 1, shape).astype(np.float32)
            self.palette = np.clip(self.palette + 28 * u(B, 4, 3), 0, 255)
            phase = 12 * x[None] * (1 + u(B, 1, 1)) + 12 * y[None] * u(B, 1, 1)
            tint = np.float32((184, 150, 116)) + 26 * u(B, 1, 1, 3)
            lamp = 1 + 0.15 * (u(B, 1, 1) * (x - 0.5) + u(B, 1, 1) * (y - 0.5))
            self.ground = tint * ((1 + 0.05 * np.sin(phase)) * lamp)[..., None]
            self.gain = 1 + 0.12 * u(B, 1, 1, 1)

    def render(self, which=slice(None)):
        """Tables `which` (an index; default all) -> uint8 [B, S, S, 3], edges anti-aliased"""
        S, canvas = self.size, self.ground[which].copy()
        tip, blocks = self.tip[which].astype(np.float32), self.blocks[which].astype(np.float32)
        palette = self.palette[which][:, :, None, None]
        centre = ((np.arange(S) + 0.5) / S).astype(np.float32)

        def paint(point, outline, color, alpha=1.0, reach=0.1):
            """Blend `color` in where outline(dx, dy), the distance inside an edge, is positive"""
            w = min(S, int(2 * reach * S) + 2)  # only a window around the point can change
            x, y = np.clip((point.T - reach) * S, 0, S - w).astype(int)[..., None] + np.arange(w)
            at = np.arange(len(canvas))[:, None, None], y[:, :, None], x[:, None, :]
            dx = centre[x][:, None, :] - point[:, 0, None, None]
            dy = centre[y][:, :, None] - point[:, 1, None, None]
            cover = (alpha * np.clip(0.5 + S * outline(dx, dy), 0, 1))[..., None]
            under = canvas[at]
            canvas[at] = under + cover * (color - under)

        def disc(radius):
            return lambda dx, dy: radius - np.hypot(dx, dy)

        for i in range(4):  # soft shadows first, then blocks
            paint(blocks[:, i] + 0.015, disc(BLOCK_RADIUS + 0.01), 0.0, 0.22)
        for i, outline in enumerate(OUTLINES):
            paint(blocks[:, i], outline, 0.72 * palette[:, i])
            paint(blocks[:, i], lambda dx, dy: outline(dx, dy) - 0.014, palette[:, i])
        paint(tip + 0.015, disc(TIP_RADIUS + 0.01), 0.0, 0.25)
        if self.embodiment == "robot":
            paint(tip, disc(TIP_RADIUS + 0.015), np.float32((38, 40, 48)))
            paint(tip, disc(TIP_RADIUS - 0.034), np.float32((236, 238, 242)))
        else:  # a fist and its thumb

            def thumb(dx, dy):
                along = np.clip((dx + dy) / 2, 0, 0.05)
                return 0.03 - np.hypot(dx - along, dy - along)

            skin = np.float32((112, 72, 52))
            paint(tip, thumb, 0.86 * skin)
            paint(tip, disc(TIP_RADIUS + 0.012), 0.8 * skin)
            paint(tip, disc(TIP_RADIUS - 0.002), skin)
        return np.clip(canvas * self.gain[which], 0, 255).astype(np.uint8)


OUTLINES = (  # distance inside the outline of each block: circle, square, triangle, star
    lambda dx, dy: BLOCK_RADIUS - np.hypot(dx, dy),
    lambda dx, dy: 0.87 * BLOCK_RADIUS - np.maximum(np.abs(dx), np.abs(dy)),
    lambda dx, dy: np.minimum(0.045 - dy, 0.045 + 0.5 * dy - 0.866 * np.abs(dx)),
    lambda dx, dy: BLOCK_RADIUS * (0.86 + 0.3 * np.cos(5 * np.arctan2(dx, -dy))) - np.hypot(dx, dy),
)


# ------------------------------------------------------------------------ datasets
@dataclass
class TabletopOptions:
    out: str  # folder to write
    episodes: int = 2000  # scripted episodes to record
    embodiment: str = "robot"  # robot or human
    look: str = "plain"  # plain or real (palette, wood grain and light drawn anew each episode)
    tasks: str = "all"  # all, seen or unseen instructions (each episode says which it is)
    noise: float = 0.1  # standard deviation added to the expert's actions, so that videos vary
    scenes: int = 0  # instead of episodes: that many still scenes of both embodiments, captioned
    size: int = 64  # pixels
    seed: int = 0


def record(o, folder):
    """Record the scripted expert; failures are dropped: every video shows its instruction."""
    unseen, kept = set(tasks("unseen")), 0
    for part in range(-(-o.episodes // 250) + 1):
        env = TableTop(250, o.embodiment, o.look, o.tasks, size=o.size)
        images, actions = [env.reset((o.seed, part))[0]["image"]], []
        while not env.done.all():
            actions.append(env.expert(o.noise))
            images.append(env.step(actions[-1])[0]["image"])
        images, actions = np.stack(images, 1), np.stack(actions, 1).astype(np.float32)
        for b in np.flatnonzero(env.success):
            name, T = f"{o.embodiment}_{kept:05d}", env.steps[b] + 1
            np.save(folder / "videos" / f"{name}.npy", images[b, :T])
            np.save(folder / "actions" / f"{name}.npy", actions[b, : T - 1])
            yield {
                "id": name,
                "instruction": env.instructions[b],
                "video": f"videos/{name}.npy",
                "fps": FPS,
                "frames": int(T),
                "actions": f"actions/{name}.npy",
                "task": FAMILIES[env.task[b, 0]],
                "embodiment": o.embodiment,
                "combination": "unseen" if tuple(env.task[b]) in unseen else "seen",
            }
            kept += 1
            if kept == o.episodes:
                return
    raise ValueError(f"--noise {o.noise}: the expert reached {kept} goals of {o.episodes}")


def scenes(o, folder, tags):
    """Still scenes, 100 to a video: what a pretrained vision-language model knows.  Each video is
    an episode that describes the table and, for each thing on it, one that says where it is."""
    parts = -(-o.scenes // 100)
    for part in range(parts):
        embodiment, (opening, closing) = ("robot", "human")[part % 2], tags[part // 2 % 2]
        env = TableTop(100, embodiment, o.look, size=o.size)
        video = f"videos/scene_{part:05d}.npy"
        np.save(folder / video, env.reset((o.seed, part))[0]["image"])
        said = {"describe the table": env.captions(np.random.default_rng((o.seed, part)))}
        for thing in THINGS:
            said[f"where is the {thing}"] = [f"{opening} {x} {closing}" for x in env.locate(thing)]
        for i, (instruction, captions) in enumerate(said.items()):
            yield {
                "id": f"scene_{part:05d}_{i}",
                "instruction": instruction,
                "video": video,
                "fps": 1,
                "frames": 100,
                "embodiment": embodiment,
                "captions": captions,
                "task": "locate" if i else "describe",
                "split": "val" if 0 < part >= parts - 2 else "train",
            }


def make_tabletop(options):
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
