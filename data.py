"""Episodes on disk -> frames, windows, token sequences and action bins.

    python data.py check DATASET    every defect at once

A dataset is a folder with `episodes.jsonl`, one episode a line:
    id           unique name                      instruction  what the robot or person was told
    video        a film, a folder of pictures, or a .npy uint8 [T, H, W, 3]; path inside DATASET
    fps          frames per second (a film may leave it out)
    frames       optional T, checked              actions      optional .npy float [T-1 or T, A]
    captions     optional list of T strings       others       carried along, for `--where a=b`"""

import hashlib
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mode

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import video
from common import (
    atomically,
    fail,
    is_main_process,
    latest,
    matching,
    refuse,
    to_json,
)
from video import how_resampled, official_resize, resize


# ------------------------------------------------------------------------ episodes
@dataclass
class Episode:
    """frames: uint8 [T, S, S, 3] (memory-mapped); actions: float32 [T-1 or T, A] or None"""

    id: str
    instruction: str
    fps: float
    info: dict
    frames: np.ndarray = None
    actions: np.ndarray = None
    key: str = ""  # of the frames in the packed cache
    codes: np.ndarray = None  # uint16 [T, N] of a VQGAN, where the model reads those


@dataclass
class Dataset:
    path: Path
    fingerprint: str  # of episodes.jsonl: labels remember it
    episodes: list

    def split(self, held_out):
        """-> (training episodes, held-out episodes): those whose `split` is not "train" or, where
        none has that field, the `held_out` ones whose id has the smallest SHA-256, so that adding
        an episode never moves more than one other across."""
        late = {e.id for e in self.episodes if e.info.get("split", "train") != "train"}
        if not any("split" in e.info for e in self.episodes):
            order = sorted(self.episodes, key=lambda e: hashlib.sha256(e.id.encode()).digest())
            late = {e.id for e in order[:held_out]}
        train = [e for e in self.episodes if e.id not in late]
        if not train:
            fail(f"{self.path}: nothing left after holding out {len(late)} episodes (--held_out)")
        return train, [e for e in self.episodes if e.id in late]


def labelled_few(episodes, count, seed, exact=True):
    """The `count` episodes (0: all) whose action labels finetuning (and VPT) may use, drawn by seed
    from those that have some; fewer, where there are not so many, unless `exact`"""
    known = [e for e in episodes if e.actions is not None]
    if not known or exact and len(known) < count:
        fail(f"--labelled {count}: only {len(known)} episodes with actions are left to learn from")
    return [known[i] for i in np.random.default_rng(seed).permutation(len(known))[: count or None]]


def open_dataset(path, size, where="", actions_needed=False, official=False):
    """Validate a dataset and open it at size x size pixels; exits with every defect listed.

    Only the episodes that match `where` ("embodiment=robot,task=push") are decoded and returned;
    official: their frames are resized as LWM's VQGAN expects, not as the LAQ does."""
    path = Path(path)
    index = path / "episodes.jsonl"
    rows, problems = _read_rows(index)
    rows = matching(rows, where, index, problems)
    pack = video.Pack(
        video.cache_file(f"frames_{size}" + "_official" * official, path), (size, size, 3), "uint8"
    )
    try:
        sources, missing = _look_at_videos(path, rows)
        undecodable = video.fill_cache(
            pack, list(sources.values()), official_resize if official else resize, path.name
        )
        episodes = []
        for row in rows:
            source = sources.get(row["id"])
            bad = undecodable.get(source.key) if source else missing[row["id"]]
            episode, defects = _load_episode(path, row, pack, source, bad, actions_needed)
            problems += [f"{index}: episode {row['id']!r}: field {text}" for text in defects]
            episodes.append(episode)
    except video.MachineFault as fault:
        fail(fault)
    episodes = [episode for episode in episodes if episode is not None]
    widths = {e.id: e.actions.shape[1] for e in episodes if e.actions is not None}
    usual = mode(widths.values()) if widths else None
    problems += [
        f"{index}: episode {name!r}: field actions: width {width}, {usual} in most other episodes"
        for name, width in widths.items()
        if width != usual
    ]
    if problems:
        shown = "\n  ".join(problems)
        fail(f"{len(problems)} defects in {path}\n  {shown}" if problems[1:] else shown)
    if is_main_process():
        video.say_about_films(path, {e.id: (pack.entries[e.key], e.fps) for e in episodes})
    return Dataset(path, hashlib.sha256(index.read_bytes()).hexdigest()[:12], episodes)


def _read_rows(index):
    """-> rows that are JSON objects, and the defects that need no decoding"""
    rows, problems = {}, []
    with refuse(f"{index.parent}: no dataset there (expected {index}, readable)"):
        lines = index.read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            problems.append(f"{index}: line {number}: expected one JSON object")
        elif not is_text(row.get("id")):
            problems.append(f"{index}: line {number}: field id: expected a name")
        elif row["id"] in rows:
            problems.append(f"{index}: episode {row['id']!r}: field id: duplicate (line {number})")
        else:
            rows[row["id"]] = row
    return list(rows.values()), problems


def _inside(root, text):
    """A path of the dataset, as episodes.jsonl gives it: relative, and never out of it.  File names
    on disk are UTF-8 whatever the locale."""
    if not isinstance(text, str) or not text or os.path.isabs(text) or ".." in Path(text).parts:
        raise ValueError("expected a path inside the dataset")
    return root / os.fsdecode(text.encode("utf-8", "surrogatepass"))


def _look_at_videos(root, rows):
    """-> {id: video.Source} of the videos that are there, {id: what is wrong} of the others"""
    sources, missing, root = {}, {}, root.resolve()
    for row in rows:
        fps = row.get("fps")
        try:
            path = _inside(root, row.get("video"))
            sources[row["id"]] = video.open_source(path, fps if _is_rate(fps) else None)
        except (OSError, ValueError) as error:
            video.refuse_machine_faults(error, root)
            missing[row["id"]] = video.reason(error)
    return sources, missing


def is_text(value):
    """Whether a JSON value is text that can be written; half of a surrogate pair cannot"""
    return isinstance(value, str) and value.strip() and not re.search("[\ud800-\udfff]", value)


def _is_rate(fps):
    return type(fps) in (int, float) and 0 < fps < 2**63


def _load_episode(root, row, pack, source, bad_video, actions_needed):
    """-> Episode (None where it has defects), and "field: text" of each defect.

    bad_video: what is wrong with the video, if anything; what follows from it is not said"""
    instruction, fps, captions = row.get("instruction"), row.get("fps"), row.get("captions")
    bad, frames, actions, T, entry = [], None, None, None, {}
    if bad_video:
        bad.append(f"video: {row.get('video')!r} cannot be read: {bad_video}")
    else:
        entry, frames = pack.entries[source.key], pack.rows(source.key)
        T = len(frames)
        if fps is None or "gaps" in entry:
            fps = entry.get("fps")
    if row.get("actions") is not None:
        try:
            actions = _load_actions(_inside(root, row["actions"]), T)
        except Exception as error:
            video.refuse_machine_faults(error, root)
            bad.append(
                f"actions: expected numbers [T-1 or T, A] in {row['actions']!r}: "
                f"{video.reason(error)}{how_resampled(entry)}"
            )
    elif actions_needed:
        bad.append("actions: missing, and this stage needs labelled episodes")
    if not is_text(instruction):
        bad.append(f"instruction: expected words, found {instruction!r}")
    if fps is None and not bad_video:
        bad.append("fps: expected frames per second, found None, and the video does not say")
    elif fps is not None and not _is_rate(fps):
        bad.append(f"fps: expected frames per second, found {fps!r}")
    if "gaps" in entry and (actions is not None or captions is not None):
        bad.append(f"video: actions and captions belong to single pictures{how_resampled(entry)}")
    if T is not None and T < 2:
        bad.append(f"video: {row['video']} holds one frame, expected at least 2")
    if T is not None and row.get("frames", T) != T:
        bad.append(
            f"frames: says {row.get('frames')!r}, but {row['video']} holds "
            f"{T}{how_resampled(entry)}"
        )
    if (
        T is not None
        and captions is not None
        and not (isinstance(captions, list) and [type(c) for c in captions] == [str] * T)
    ):
        bad.append(f"captions: expected a list of {T} strings{how_resampled(entry)}")
    if bad:
        return None, bad
    episode = Episode(row["id"], instruction.strip(), float(fps), row, frames, actions, source.key)
    return episode, bad


def _load_actions(path, T):
    with np.errstate(over="ignore"):  # too large for float32: infinity
        actions = np.load(path).astype(np.float32, casting="same_kind")
    if actions.ndim != 2 or actions.shape[1] == 0 or T and len(actions) not in (T - 1, T):
        raise ValueError(f"found shape {actions.shape}, T is {T or 'unknown'}")
    broken = np.flatnonzero(~np.isfinite(actions).all(1))
    if len(broken):
        raise ValueError(
            f"found NaN, infinity or what is too large for float32, first in row {broken[0]}"
        )
    return actions


# ------------------------------------------------------------------------ frames and their codes
def to_float(frames, device=torch.device("cpu")):
    """uint8 [.., H, W, 3] -> float32 tensor [.., 3, H, W] in [0, 1] on the device"""
    x = torch.from_numpy(np.ascontiguousarray(frames))
    if device.type == "cuda":  # as bytes, and nobody waits for it
        x = x.pin_memory().to(device, non_blocking=True)
    return x.movedim(-1, -3).float() / 255


def open_vqgan(path, option, device, shape):
    """The image tokenizer beside a VLA of that shape (its config): see official/vqgan.py.  None for
    a VLA that reads linear patches.  Refuses one that reads no images."""
    if not shape["patch_size"]:
        fail(f"--{option} {latest(path)}: a model of text alone, it reads no images")
    if not shape["vision_vocab"]:
        return None
    from official.vqgan import load_vqgan  # only models that read codes need it

    return load_vqgan(path, option, device, shape)


def add_codes(dataset, episodes, vqgan, processes, most=1 << 16):
    """Give episodes of a dataset the codes of their frames, uint16 [T, N] memory-mapped: made once,
    each process its share, and kept in a packed cache under the VQGAN's hash.  most: frames whose
    codes are held in memory before they are written"""
    size = vqgan.config.image_size
    patches = (size // 2 ** (len(vqgan.config.multipliers) - 1)) ** 2
    try:
        path = video.cache_file(f"codes_{vqgan.mark}_{size}", dataset.path)
        pack = video.Pack(path, (patches,), "uint16")
        missing = {e.key: e for e in episodes if e.key not in pack.entries}
        ours = list(missing.values())[processes.rank :: processes.world]
        fresh, count = {}, 0
        for e in tqdm(
            ours, "image codes", mininterval=1.0, leave=False, disable=not processes.main
        ):
            codes = [
                vqgan.encode(to_float(np.array(e.frames[t : t + 16]), processes.device) * 2 - 1)
                for t in range(0, len(e.frames), 16)
            ]
            fresh[e.key] = torch.cat(codes).cpu().numpy().astype(np.uint16)
            count += len(fresh[e.key])
            if count > most:
                _write_codes(pack, fresh)
                fresh, count = {}, 0
        _write_codes(pack, fresh)
        processes.barrier()
        pack.read_index()
        for e in episodes:
            e.codes = pack.rows(e.key)
    except video.MachineFault as fault:
        fail(fault)


def _write_codes(pack, fresh):
    """Append arrays {key: codes} that no other process has written meanwhile"""
    if fresh:
        with pack.writing():
            for key, codes in fresh.items():
                if key not in pack.entries:
                    pack.append(key, [codes.tobytes()])


# ------------------------------------------------------------------------ windows and batches
def window_frames(seconds, fps):
    """A window in seconds -> H in whole frames of an episode, at least 1 (0.6 s at 5 fps: 3)"""
    return max(1, int(seconds * fps + 0.5))


def future_index(t, length, h):
    """x_{t+H}, clamped to the last frame at the end of an episode (code)"""
    return np.minimum(np.asarray(t) + h, length - 1)


def frame_pairs(episodes, which, window):
    """which [(episode index, t), ..] -> uint8 [B, 2, S, S, 3]: x_t and x_{t+H}"""

    def pair(e, t):
        return e.frames[[t, future_index(t, len(e.frames), window_frames(window, e.fps))]]

    return np.stack([pair(episodes[e], t) for e, t in which])


def draw(seed, step, batch, lengths):
    """`batch` random (clip, frame) pairs, a pure function of (seed, step): a random frame of a
    random clip, as the official code draws them. lengths: frames of each clip."""
    rng = np.random.default_rng((seed, step))
    clips = rng.integers(len(lengths), size=batch)
    return [(int(e), int(rng.random() * lengths[e])) for e in clips]


class FrameSampler:
    """The frames of each step's batch, a pure function of (seed, step): see `draw`.

    episodes: where they come from; frame_counts: of each, how many frames have an answer;
    local_rows: the part of the global batch that this process reads"""

    def __init__(
        self,
        episodes: list[Episode],
        frame_counts: list[int],
        seed: int,
        global_batch: int,
        local_rows: slice,
    ) -> None:
        self.episodes = episodes
        self.frame_counts = frame_counts
        self.seed = seed
        self.global_batch = global_batch
        self.local_rows = local_rows

    def __call__(self, step: int) -> list[tuple[int, int]]:
        """-> (episode index, frame) of this process's rows"""
        return draw(self.seed, step, self.global_batch, self.frame_counts)[self.local_rows]

    def episode_ids(self, step: int) -> list[str]:
        """The names of the episodes behind these rows"""
        return [self.episodes[episode].id for episode, _ in self(step)]


def stream(make, start, stop, workers=1, ahead=3):
    """Yield make(step) for step in start..stop-1, prepared in the background, always in order."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = []
        for step in range(start, stop + ahead):
            if step < stop:
                waiting.append(pool.submit(make, step))
            if step >= start + ahead:
                yield waiting.pop(0).result()


def random_shift(pictures, share, batch=None, mine=slice(None)):
    """Move the pictures of each row [B, .., H, W] by one random offset of up to `share` of their
    size, edges replicated.  The rows are the part `mine` of a global batch of offsets."""
    B, H, W = len(pictures), *pictures.shape[-2:]

    def shifted(length):
        most = int(share * length)
        offset = torch.randint(-most, most + 1, (batch or B, 1))[mine]
        return (torch.arange(length) + offset).clamp(0, length - 1).to(pictures.device)

    at = torch.arange(B, device=pictures.device)[:, None, None]
    return pictures[at, ..., shifted(H)[:, :, None], shifted(W)[:, None]].movedim((1, 2), (-2, -1))


# ------------------------------------------------------------------------ labels and action bins
def save_labels(path, labels, meta):
    """labels: episode id -> int [T, K], into one safetensors file whose header holds meta: LAQ
    fingerprint, window, codebook size, dataset mark"""
    packed = {name: torch.from_numpy(rows.astype(np.uint16)) for name, rows in labels.items()}
    with refuse(f"{path}: not written", (OSError, SafetensorError)), atomically(path) as draft:
        save_file(packed, draft, {"meta": to_json(meta)})


def load_labels(path, dataset, episodes):
    """-> list of int64 [T, K], one an episode, and the labels' meta.  Refuses another dataset's."""
    with (
        refuse(
            f"{path}: no labels there (make them with quantize.py label)",
            (OSError, SafetensorError, TypeError, KeyError, ValueError),
        ),
        safe_open(path, "numpy") as file,
    ):
        meta = json.loads(file.metadata()["meta"])
        found = {name: file.get_tensor(name).astype(np.int64) for name in file.keys()}
    if meta["dataset"] != dataset.fingerprint:
        fail(
            f"{path}: made for another dataset ({meta['dataset']}) than {dataset.path} "
            f"({dataset.fingerprint})"
        )
    for e in episodes:
        if (count := len(found.get(e.id, ()))) != len(e.frames):
            fail(f"{path}: episode {e.id!r} has {count} labels, expected {len(e.frames)}")
    return [found[e.id] for e in episodes], meta


FEW = 16  # an action dimension with that many distinct values at most has one bin for each of them


def fit_bins(actions, bins=256, binary=""):
    """Cut every action dimension into bins (paper 3.3) -> list of A float64 arrays.

    actions float [M, A].  A dimension of few values (a gripper's -1 and 1, the keys -1, 0, 1) has
    one bin for each value and decodes to exactly that: its array lists these values, the first one
    twice.  Any other has up to `bins` bins of equal count, and its array holds their edges: see
    quantile_edges.  A constant dimension keeps its one value.  `binary` ("6": the gripper is
    dimension 6) names dimensions that have two values: see binary_bins."""
    A, two = actions.shape[1], binary.split(",")
    if binary and not {*two} <= {*map(str, range(A))}:
        fail(f"--binary {binary!r}: expected dimensions of 0 to {A - 1}, comma separated")
    edges = []
    for a in range(A):
        column = actions[:, a].astype(np.float64)
        values = distinct_values(column)
        if str(a) in two:
            edges.append(binary_bins(a, column, values, bins))
        elif len(values) == 1:
            edges.append(values)
        elif len(values) <= min(FEW, bins):
            edges.append(bins_of_values(values))
        else:
            edges.append(quantile_edges(column, bins))
    return edges


def distinct_values(column):
    """The distinct values of a column, in rising order.  Where these are a few heaps that only the
    rounding of float32 spreads (1 and 0.9999999), the most frequent one of each"""
    values, counts = np.unique(column, return_counts=True)
    rounding = 1e-6 * np.abs(values).max()
    heaps = np.split(np.arange(len(values)), np.flatnonzero(np.diff(values) > rounding) + 1)
    if len(heaps) > FEW or any(np.ptp(values[heap]) > rounding for heap in heaps):
        return values
    return np.array([values[heap[counts[heap].argmax()]] for heap in heaps])


def quantile_edges(column, bins):
    """Edges of up to `bins` bins of equal count, as pandas' qcut cuts them: duplicate edges are
    dropped, so fewer bins may remain"""
    return np.unique(np.quantile(column.astype(np.float64), np.linspace(0, 1, bins + 1)))


def bins_of_values(values):
    """One bin for each of these values, in rising order.  Edges never repeat, so a first number
    that stands twice marks an array of values."""
    return np.concatenate([values[:1], values])


def binary_bins(a, column, values, bins):
    """Bins of dimension `a`, which --binary names, given its column and its distinct values: the
    official edges, which decode to 0 and 1, for these and for more than a few in between; one bin
    for each of a few other values, or for each of two heaps.  Refuses anything else."""
    few = len(values) <= min(FEW, bins)
    if {*values} <= {0.0, 1.0} or not few and values[0] > -0.1 and values[-1] < 1.1:
        return np.array([-0.5, 0.5, 1.5])
    if few:
        return bins_of_values(values) if len(values) > 1 else values
    high = column > (values[0] + values[-1]) / 2
    heaps = np.median(column[~high]), np.median(column[high])
    if np.abs(column - np.where(high, *heaps[::-1])).mean() > 0.05 * np.ptp(values):
        fail(
            f"--binary {a}: dimension {a} has {len(values)} values from {values[0]:g} to "
            f"{values[-1]:g}, expected two, or values between 0 and 1"
        )
    return bins_of_values(np.array(heaps))


def describe_bins(edges, actions):
    """How many bins each dimension has, and what the rows float [M, A] lose in them, in words"""
    said, errors = [], np.abs(from_bins(to_bins(actions, edges), edges) - actions).mean(0)
    for a, e in enumerate(edges):
        values, count = distinct_values(actions[:, a].astype(np.float64)), max(1, len(e) - 1)
        if errors[a] > 1e-6 * np.abs(actions[:, a]).max():
            said.append(f"{count} for {len(values)} values (off by {errors[a]:.2g} on average)")
        else:
            said.append(f"{count} (one per value)" if count > 1 else f"1 (always {values[0]:g})")
    return "bins per dimension: " + ", ".join(said)


def refuse_other_values(edges, actions, whose, guessed=False):
    """Refuse actions float [M, A] that bins made from other data would turn into other values: a
    gripper's -1 and 1 where these are for 0 and 1, millimeters where they are for meters.

    guessed: the bins come from guesses of the same actions, so only few values are refused"""
    decoded = from_bins(to_bins(actions, edges), edges)
    for a in range(len(edges)):
        values = np.unique(actions[:, a])
        error = np.sqrt(((decoded[:, a] - actions[:, a]) ** 2).mean())
        if error > 0.5 * max(actions[:, a].std(), 0.001 * np.ptp(edges[a]), 1e-9):
            if not guessed or len(values) <= FEW:
                shown = " becomes ".join(
                    f"{rows[:, a].min():g} to {rows[:, a].max():g}" for rows in (actions, decoded)
                )
                fail(
                    f"{whose}: its bins were made for other values of dimension {a}: {shown}; "
                    "scale the actions as in pretraining, or pretrain on these"
                )


def soft_widths(edges, soft):
    """The width `soft` for each dimension, 0 where there are so few bins that none is nearly right:
    smoothed, a gripper's two would hardly differ"""
    return [0.0 if len(e) <= FEW + 1 else soft for e in edges] if soft else 0.0


def is_value_list(e):
    """Whether a dimension's array lists the values of its bins, not their edges"""
    return len(e) == 1 or e[0] == e[1]


def to_bins(actions, edges):
    """float [.., A] -> int64 [.., A]: the bin whose left edge is the last one <= the value; values
    outside fall into the end bins, since only the inner edges count.  Where an array lists values,
    the nearest one."""
    columns = []
    for a, e in enumerate(edges):
        inner = (e[1:-1] + e[2:]) / 2 if is_value_list(e) else e[1:-1]
        columns.append(np.searchsorted(inner, actions[..., a], side="right"))
    return np.stack(columns, -1).astype(np.int64)


def from_bins(indices, edges):
    """int [.., A] -> float64 [.., A]: the middle of each bin, or its value; past the last bin
    counts as last"""
    columns = []
    for a, e in enumerate(edges):
        decoded = e[-max(1, len(e) - 1) :] if is_value_list(e) else (e[1:] + e[:-1]) / 2
        columns.append(decoded.take(indices[..., a], mode="clip"))
    return np.stack(columns, -1)


def r2(guess, target):
    """Share of the variance of target [M, A] that guess explains, per axis; None for a constant"""
    error = ((guess - target) ** 2).sum(0)
    spread = ((target - target.mean(0)) ** 2).sum(0)
    moves = spread > 1e-20 * (target**2).sum(0)  # more than rounding does
    return [1 - float(e) / float(s) if m else None for e, s, m in zip(error, spread, moves)]


if __name__ == "__main__":
    command, rest = sys.argv[1:2], sys.argv[2:]
    if {"-h", "--help"} & {*sys.argv}:
        print(__doc__.strip())
    elif command == ["check"] and len(rest) == 1:
        found = open_dataset(rest[0], 64)
        print(
            f"{rest[0]}: {len(found.episodes)} episodes, "
            f"{sum(len(e.frames) for e in found.episodes)} frames, "
            f"{sum(e.actions is not None for e in found.episodes)} with actions, "
            f"fingerprint {found.fingerprint}: no defects"
        )
    else:
        fail("expected: data.py check DATASET")
