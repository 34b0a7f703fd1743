"""A table top in numpy: four blocks, one effector, quasi-static pushing, pixels out.

The built-in simulator, in the spirit of Language Table.  Everything is vectorised over B tables.

    env = TableTop(batch=2)
    obs, info = env.reset(seed=0)              # obs["image"] uint8 [2, 64, 64, 3]
    while not env.done.all():
        obs, reward, terminated, truncated, info = env.step(env.expert())

The table is the unit square, x to the right and y down as in the picture.  Actions are float [B, 2]
in [-1, 1]: the wanted displacement of the effector in units of the embodiment's speed.  Blocks are
discs for contact (whatever their looks) and do not turn.  A finished table stays as it is until
`reset`.
"""

import numpy as np

COLORS = {"red": (214, 62, 58), "blue": (58, 108, 208), "green": (62, 158, 84),
          "yellow": (236, 186, 52)}
BLOCKS = ("red circle", "blue square", "green triangle", "yellow star")
THINGS = ("tip", *BLOCKS)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PLACES = {"left side": (0, np.nan), "right side": (1, np.nan), "top side": (np.nan, 0),
          "bottom side": (np.nan, 1), "top left corner": (0, 0), "top right corner": (1, 0),
          "bottom left corner": (0, 1), "bottom right corner": (1, 1)}
FAMILIES = ("reach", "push", "place", "join")
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
    rows = []
    for f, family in enumerate(FAMILIES):
        arguments = {"reach": 1, "push": len(DIRECTIONS), "place": len(PLACES), "join": 4}[family]
        for block in range(4):
            for argument in range(arguments):
                if family == "join" and argument == block:
                    continue
                unseen = (block + argument) % 4 == 3
                if split == "all" or unseen == (split == "unseen"):
                    rows.append((f, block, argument))
    return rows


def instruction(family, block, argument):
    name = BLOCKS[block]
    if FAMILIES[family] == "reach":
        return f"move to the {name}"
    if FAMILIES[family] == "push":
        return f"push the {name} {list(DIRECTIONS)[argument]}"
    if FAMILIES[family] == "place":
        return f"push the {name} to the {list(PLACES)[argument]}"
    return f"push the {name} to the {BLOCKS[argument]}"


def vocabulary():
    """Every text the table top can produce, for training a word-level tokenizer"""
    numbers = " ".join(map(str, range(CAPTION_BINS)))
    return [instruction(*task) for task in tasks()] + [f"describe the table where is tip {numbers}"]


class TableTop:
    """A batch of tables.

    batch: number of tables; embodiment: "robot" (a compact gripper) or "human" (a hand with a
    thumb, other table, slower); look: "plain" or "real" (palette, wood grain and lighting drawn
    anew for each table); split: which tasks, see `tasks`; families: subset of FAMILIES;
    size: pixels; max_steps: steps until `truncated`."""

    def __init__(self, batch, embodiment="robot", look="plain", split="all", families=FAMILIES,
                 size=64, max_steps=50):
        for value, allowed, name in ((embodiment, SPEED, "embodiment"),
                                     (look, ("plain", "real"), "look"),
                                     (split, ("all", "seen", "unseen"), "split")):
            if value not in allowed:
                raise ValueError(f"{name} is one of {', '.join(allowed)}, not {value!r}")
        self.batch, self.embodiment, self.look, self.size = batch, embodiment, look, size
        self.speed, self.max_steps = SPEED[embodiment], max_steps
        chosen = [t for t in tasks(split) if FAMILIES[t[0]] in families]
        self.by_family = [[t for t in chosen if t[0] == f] for f in range(len(FAMILIES))]
        self.by_family = [rows for rows in self.by_family if rows]

    # -------------------------------------------------------------- the Gymnasium interface

    def reset(self, seed):
        """-> obs, info.  The same seed gives the same tables, tasks and pixels, bit for bit."""
        B = self.batch
        self.rng = rng = np.random.default_rng(seed)
        family = rng.integers(len(self.by_family), size=B)
        self.task = np.array([self.by_family[f][rng.integers(len(self.by_family[f]))]
                              for f in family])  # B 3
        self.instructions = [instruction(*task) for task in self.task]
        # One thing after another, each at the first of 40 random spots that touches nothing so far
        # (or at the one with most room).
        layout = np.zeros((B, 0, 2))
        for margin in (0.1, 0.25, 0.25, 0.25, 0.25):  # the effector, then the blocks
            spots = rng.uniform(margin, 1 - margin, (B, 40, 2))
            gap = np.linalg.norm(spots[:, :, None] - layout[:, None], axis=-1).min(2, initial=9.0)
            pick = np.where((gap > 0.17).any(1), (gap > 0.17).argmax(1), gap.argmax(1))
            layout = np.concatenate([layout, spots[np.arange(B), pick][:, None]], axis=1)
        self.tip, self.blocks = layout[:, 0].copy(), layout[:, 1:].copy()
        self.start = self.blocks.copy()
        self.steps = np.zeros(B, int)
        self.done = np.zeros(B, bool)
        self.success = np.zeros(B, bool)
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
        live = ~self.done
        motion = np.clip(action, -1, 1) * self.speed * live[:, None]
        tip, blocks = self.tip, self.blocks.copy()
        for _ in range(4):  # sub-steps, so that a fast tip cannot jump into a block
            self._move(motion / 4)
        self.tip = np.where(live[:, None], self.tip, tip)
        self.blocks = np.where(live[:, None, None], self.blocks, blocks)
        self.steps += live
        won = live & self._solved()
        self.success |= won
        terminated = self.success.copy()
        truncated = ~terminated & (self.steps >= self.max_steps)
        self.done = terminated | truncated
        self.image[live] = self.render(np.flatnonzero(live))
        obs, info = self._now()
        return obs, won.astype(float), terminated, truncated, info

    def _now(self):
        """-> obs, info"""
        return {"image": self.image.copy(), "instruction": list(self.instructions)}, \
            {"success": self.success.copy(), "family": [FAMILIES[f] for f in self.task[:, 0]]}

    # -------------------------------------------------------------- physics and success

    def _move(self, motion):
        before = self.tip
        self.tip = np.clip(before + motion, 0, 1)
        motion = self.tip - before
        for _ in range(2):
            away = self.blocks - self.tip[:, None]  # B 4 2
            distance = np.linalg.norm(away, axis=-1, keepdims=True) + 1e-9
            normal = away / distance
            touched = distance < CONTACT
            towards = (normal * motion[:, None]).sum(-1, keepdims=True) > 0
            self.blocks += GRIP * motion[:, None] * (touched & towards)
            away = self.blocks - self.tip[:, None]
            distance = np.linalg.norm(away, axis=-1, keepdims=True) + 1e-9
            self.blocks += away / distance * np.maximum(CONTACT - distance, 0)
            motion = np.zeros_like(motion)  # drag once, then only resolve overlaps
            between = self.blocks[:, :, None] - self.blocks[:, None]  # B 4 4 2
            distance = np.linalg.norm(between, axis=-1, keepdims=True) + 1e-9
            overlap = np.maximum(2 * BLOCK_RADIUS - distance, 0) * (1 - np.eye(4))[..., None]
            self.blocks += (between / distance * overlap / 2).sum(2)
            self.blocks = np.clip(self.blocks, RIM, 1 - RIM)

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
        near = np.where(argument % 8 < 4, SIDE, CORNER)
        place = np.linalg.norm(block - goal, axis=-1) < near
        join = np.linalg.norm(block - other, axis=-1) < JOIN
        return np.choose(family, (reach, push, place, join))

    def expert(self, noise=0.0):
        """A scripted policy's next action [B, 2]: get behind the block, then push."""
        family, _, block, start, way, goal, other = self._parts()
        aim = np.where(family[:, None] == 1, start + 0.3 * way, goal)
        aim = np.where(family[:, None] == 3, other, aim)
        ahead = aim - block
        ahead /= np.linalg.norm(ahead, axis=-1, keepdims=True) + 1e-9
        side = np.stack([-ahead[:, 1], ahead[:, 0]], -1)
        offset = self.tip - block
        forward, lateral = (offset * ahead).sum(-1), (offset * side).sum(-1)
        ready = (forward < -0.04) & (np.abs(lateral) < 0.03)
        # Straight to the spot behind the block, unless the block is in the way: then round it.
        wish = block - ahead * (CONTACT + 0.01) - self.tip
        share = (-offset * wish).sum(-1) / ((wish * wish).sum(-1) + 1e-9)
        nearest = np.linalg.norm(offset + np.clip(share, 0, 1)[:, None] * wish, axis=-1)
        radius = np.linalg.norm(offset, axis=-1, keepdims=True) + 1e-9
        turn = np.where(lateral >= 0, 1.0, -1.0)[:, None]
        room = lambda sign: np.abs(block + sign * side * CONTACT - 0.5).max(-1, keepdims=True) < 0.5
        turn = np.where(room(turn) | ~room(-turn), turn, -turn)  # not between block and edge
        tangent = turn * np.stack([-offset[:, 1], offset[:, 0]], -1) / radius
        around = self.speed * tangent + offset / radius * (CONTACT + 0.03 - radius)
        wish = np.where((nearest < CONTACT - 0.01)[:, None], around, wish)
        push = ahead * self.speed - side * lateral[:, None] * 0.8
        wish = np.where(ready[:, None], push, wish)
        wish = np.where(family[:, None] == 0, block - self.tip, wish)
        wish = wish / self.speed
        wish /= np.maximum(np.linalg.norm(wish, axis=-1, keepdims=True), 1)
        return np.clip(wish + noise * self.rng.standard_normal(wish.shape), -1, 1)

    # -------------------------------------------------------------- words and pixels

    def captions(self, rng):
        """What a vision-language model would say of each table: names and places in random order"""
        return [" ".join(f"{THINGS[i].split()[0]} {where[i]}" for i in rng.permutation(len(THINGS)))
                for where in zip(*(self.locate(thing) for thing in THINGS))]

    def locate(self, thing):
        """Where a thing (of THINGS) is on each table, in words: "3 12" """
        spot = self.tip if thing == "tip" else self.blocks[:, BLOCKS.index(thing)]
        return [f"{x} {y}" for x, y in (spot.clip(0, 0.999) * CAPTION_BINS).astype(int)]

    def _dress(self):
        """Draw the looks of each table: colours float [B, 4, 3] in 0..255, ground [B, S, S, 3]"""
        B, S, rng = self.batch, self.size, self.rng
        self.palette = np.tile(np.array(list(COLORS.values()), np.float32), (B, 1, 1))
        base = {"robot": (206, 212, 218), "human": (222, 200, 168)}[self.embodiment]
        y, x = np.mgrid[0:S, 0:S].astype(np.float32) / S
        ground = np.tile(np.array(base, np.float32), (S, S, 1))
        if self.embodiment == "human":  # planks
            ground[(y % 0.25) < 1 / S] *= 0.9
        self.ground = np.tile(ground, (B, 1, 1, 1))
        self.gain = np.ones((B, 1, 1, 1), np.float32)
        if self.look == "real":
            u = lambda *shape: rng.uniform(-1, 1, shape).astype(np.float32)
            self.palette = np.clip(self.palette + 28 * u(B, 4, 3), 0, 255)
            phase = 12 * x[None] * (1 + u(B, 1, 1)) + 12 * y[None] * u(B, 1, 1)
            tint = np.array((184, 150, 116), np.float32) + 26 * u(B, 1, 1, 3)
            lamp = 1 + 0.15 * (u(B, 1, 1) * (x - 0.5) + u(B, 1, 1) * (y - 0.5))
            self.ground = tint * ((1 + 0.05 * np.sin(phase)) * lamp)[..., None]
            self.gain = 1 + 0.12 * u(B, 1, 1, 1)

    def render(self, which=None):
        """Tables `which` (indices; default all) -> uint8 [B, S, S, 3], edges anti-aliased"""
        which = np.arange(self.batch) if which is None else which
        S, rows = self.size, np.arange(len(which))[:, None, None]
        canvas = self.ground[which].copy()
        tip, blocks = self.tip[which].astype(np.float32), self.blocks[which].astype(np.float32)
        palette = self.palette[which][:, :, None, None]
        centre = ((np.arange(S) + 0.5) / S).astype(np.float32)

        def paint(point, outline, color, alpha=1.0, reach=0.1):
            """Blend `color` in where outline(dx, dy), the distance inside an edge, is positive"""
            w = min(S, int(2 * reach * S) + 2)  # only a window around the point can change
            x, y = (np.clip((point[:, i] - reach) * S, 0, S - w).astype(int)[:, None] + np.arange(w)
                    for i in (0, 1))
            at = rows, y[:, :, None], x[:, None, :]
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
            skin = np.float32((112, 72, 52))
            paint(tip, _thumb, 0.86 * skin)
            paint(tip, disc(TIP_RADIUS + 0.012), 0.8 * skin)
            paint(tip, disc(TIP_RADIUS - 0.002), skin)
        return np.clip(canvas * self.gain[which], 0, 255).astype(np.uint8)


def _thumb(dx, dy):
    along = np.clip((dx + dy) / 2, 0, 0.05)
    return 0.03 - np.hypot(dx - along, dy - along)


OUTLINES = (  # distance inside the outline of each block: circle, square, triangle, star
    lambda dx, dy: BLOCK_RADIUS - np.hypot(dx, dy),
    lambda dx, dy: 0.87 * BLOCK_RADIUS - np.maximum(np.abs(dx), np.abs(dy)),
    lambda dx, dy: np.minimum(0.045 - dy, 0.045 + 0.5 * dy - 0.866 * np.abs(dx)),
    lambda dx, dy: BLOCK_RADIUS * (0.86 + 0.3 * np.cos(5 * np.arctan2(dx, -dy))) - np.hypot(dx, dy))
