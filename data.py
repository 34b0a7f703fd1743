"""Episodes on disk -> frames -> windows and batches; image codes, labels, action bins.

    python data.py check DATASET    every defect at once

A dataset is a folder with `episodes.jsonl`, one episode per line (docs/formats.md):
    id           unique name                      instruction  what the robot or person was told
    video        a film, a folder of pictures, or a .npy uint8 [T, H, W, 3]; path inside DATASET
    fps          frames per second (a film may leave it out)
    frames       optional T, checked              actions      optional .npy float [T-1 or T, A]
    captions     optional list of T strings       others       carried along, for `--where a=b`

Letters: T frames of an episode, S pixels per side, A action dimensions, B batch."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import video
from common import atomically, fail, is_main_process, latest, matching, refuse, to_json
from video import how_resampled, official_resize, resize

Batch = TypeVar("Batch")


# ------------------------------------------------------------------------ episodes
@dataclass
class Episode:
    """One video, and what is known about it"""

    id: str
    instruction: str
    fps: float
    info: dict  # its line of episodes.jsonl
    frames: np.ndarray | None = None  # uint8 [T, S, S, 3], memory-mapped
    actions: np.ndarray | None = None  # float32 [T-1 or T, A]
    key: str = ""  # of its frames in the packed cache
    codes: np.ndarray | None = None  # uint16 [T, N] of a VQGAN, memory-mapped


@dataclass
class Dataset:
    """The episodes of a folder that match a `--where`"""

    path: Path
    fingerprint: str  # of episodes.jsonl, by which labels and runs know the dataset
    episodes: list[Episode]

    def split(self, held_out: int) -> tuple[list[Episode], list[Episode]]:
        """-> training episodes, held-out episodes.

        Those whose `split` is not "train" are held out or, if none has that field, the `held_out`
        ones whose id has the smallest SHA-256: adding an episode displaces at most one."""
        if any("split" in e.info for e in self.episodes):
            chosen = [e for e in self.episodes if e.info.get("split", "train") != "train"]
        else:
            by_hash = sorted(self.episodes, key=lambda e: hashlib.sha256(e.id.encode()).digest())
            chosen = by_hash[:held_out]
        held_out_ids = {e.id for e in chosen}
        train = [e for e in self.episodes if e.id not in held_out_ids]
        if not train:
            fail(
                f"{self.path}: nothing left to train on after holding out {len(held_out_ids)} "
                "episodes (--held_out)"
            )
        return train, [e for e in self.episodes if e.id in held_out_ids]


def labelled_few(
    episodes: Sequence[Episode], count: int, seed: int, exact: bool = True
) -> list[Episode]:
    """The few episodes whose actions finetuning (and VPT) may use: `count` of those that have
    actions, 0: all, drawn by seed.  Where there are fewer, refuses or, unless `exact`, takes them
    all.  Refuses episodes that have no actions at all."""
    labelled = [e for e in episodes if e.actions is not None]
    if not labelled or (exact and len(labelled) < count):
        fail(f"--labelled {count}: only {len(labelled)} episodes with actions to train on")
    order = np.random.default_rng(seed).permutation(len(labelled))
    return [labelled[i] for i in order[: count or None]]


# ------------------------------------------------------------------------ opening a dataset
def open_dataset(
    path: str | Path,
    size: int,
    where: str = "",
    actions_needed: bool = False,
    for_vqgan: bool = False,
) -> Dataset:
    """Validate a dataset and open it at size x size pixels; exits with every defect listed.

    Only the episodes that match `where` ("embodiment=robot,task=push") are decoded and returned.
    for_vqgan: resize frames as LWM's VQGAN expects, not as the LAQ does"""
    path = Path(path)
    index = path / "episodes.jsonl"
    rows, problems = read_index(index)
    rows = matching(rows, where, index, problems)
    folder = f"frames_{size}_official" if for_vqgan else f"frames_{size}"
    resized = official_resize if for_vqgan else resize
    try:
        pack = video.Pack(video.cache_file(folder, path), (size, size, 3), "uint8")
        episodes, defects = load_episodes(path, rows, pack, resized, actions_needed)
    except video.MachineFault as fault:
        fail(str(fault))
    defects += width_defects(episodes)
    problems += [f"{index}: episode {name!r}: field {text}" for name, text in defects]
    if problems:
        shown = "\n  ".join(problems)
        fail(f"{len(problems)} defects in {path}\n  {shown}" if len(problems) > 1 else shown)
    if is_main_process():
        video.say_about_films(path, {e.id: (pack.entries[e.key], e.fps) for e in episodes})
    return Dataset(path, hashlib.sha256(index.read_bytes()).hexdigest()[:12], episodes)


def read_index(index: Path) -> tuple[list[dict], list[str]]:
    """-> the lines of episodes.jsonl that are JSON objects with an id of their own, and what is
    wrong with the others"""
    rows: dict[str, dict] = {}
    problems: list[str] = []
    with refuse(f"{index.parent}: no dataset there (expected a readable {index})"):
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


def load_episodes(
    root: Path, rows: list[dict], pack: video.Pack, resized: Callable, actions_needed: bool
) -> tuple[list[Episode], list[tuple[str, str]]]:
    """Decode what the cache lacks -> the episodes without defects; of the others, pairs of id and
    "field: what is wrong".  Raises video.MachineFault."""
    sources, unreadable = find_videos(root, rows)
    undecodable = video.fill_cache(pack, list(sources.values()), resized, root.name)
    episodes: list[Episode] = []
    defects: list[tuple[str, str]] = []
    for row in rows:
        source = sources.get(row["id"])
        video_error = undecodable.get(source.key) if source else unreadable[row["id"]]
        episode, found = load_episode(root, row, pack, source, video_error, actions_needed)
        defects += [(row["id"], text) for text in found]
        if episode is not None:
            episodes.append(episode)
    return episodes, defects


def find_videos(root: Path, rows: list[dict]) -> tuple[dict[str, video.Source], dict[str, str]]:
    """-> the videos that are there, {id: source}, and what is wrong with the others, {id: text}"""
    sources: dict[str, video.Source] = {}
    unreadable: dict[str, str] = {}
    root = root.resolve()
    for row in rows:
        fps = row.get("fps") if is_rate(row.get("fps")) else None
        try:
            sources[row["id"]] = video.open_source(path_inside(root, row.get("video")), fps)
        except (OSError, ValueError) as error:
            video.refuse_machine_faults(error, root)
            unreadable[row["id"]] = video.reason(error)
    return sources, unreadable


def path_inside(root: Path, text: object) -> Path:
    """A path as episodes.jsonl gives it: relative, and never out of the dataset.  File names on
    disk are UTF-8 whatever the locale.  Raises ValueError."""
    if not isinstance(text, str) or not text or os.path.isabs(text) or ".." in Path(text).parts:
        raise ValueError("expected a path inside the dataset")
    return root / os.fsdecode(text.encode("utf-8", "surrogatepass"))


def is_text(value: object) -> bool:
    """Whether a JSON value is text that can be written; half of a surrogate pair cannot"""
    return (
        isinstance(value, str) and value.strip() != "" and not re.search("[\ud800-\udfff]", value)
    )


def is_rate(fps: object) -> bool:
    """Whether a JSON value can be frames per second"""
    return type(fps) in (int, float) and 0 < fps < 2**63


def load_episode(
    root: Path,
    row: dict,
    pack: video.Pack,
    source: video.Source | None,
    video_error: str | None,
    actions_needed: bool,
) -> tuple[Episode | None, list[str]]:
    """-> Episode (None if it has defects), and "field: what is wrong" per defect.

    video_error: what is wrong with the video, or None; what follows from it is not reported"""
    entry: dict = {}  # what the cache knows about the video
    frames, fps = None, row.get("fps")
    defects: list[str] = []
    if video_error:
        defects.append(f"video: {row.get('video')!r} cannot be read: {video_error}")
    else:
        entry, frames = pack.entries[source.key], pack.rows(source.key)
        if fps is None or "gaps" in entry:  # the file says it, or the film was resampled
            fps = entry.get("fps")
    actions, action_defects = load_actions(root, row, frames, entry, actions_needed)
    defects += action_defects
    if not is_text(row.get("instruction")):
        defects.append(f"instruction: expected words, found {row.get('instruction')!r}")
    if fps is None and not video_error:
        defects.append("fps: missing, and the video file does not state it")
    elif fps is not None and not is_rate(fps):
        defects.append(f"fps: expected frames per second, found {fps!r}")
    if frames is not None:
        defects += frame_defects(row, len(frames), entry, actions is not None)
    if defects:
        return None, defects
    words = row["instruction"].strip()
    return Episode(row["id"], words, float(fps), row, frames, actions, source.key), []


def frame_defects(row: dict, frame_count: int, entry: dict, has_actions: bool) -> list[str]:
    """What contradicts the number of frames, or the clock, of a video that could be read"""
    defects, captions = [], row.get("captions")
    if "gaps" in entry and (has_actions or captions is not None):
        defects.append(
            f"video: actions and captions belong to individual pictures{how_resampled(entry)}"
        )
    if frame_count < 2:
        defects.append(f"video: {row['video']} has one frame, expected at least 2")
    if row.get("frames", frame_count) != frame_count:
        defects.append(
            f"frames: says {row.get('frames')!r}, but {row['video']} has {frame_count}"
            f"{how_resampled(entry)}"
        )
    is_list = isinstance(captions, list) and all(type(caption) is str for caption in captions)
    if captions is not None and not (is_list and len(captions) == frame_count):
        defects.append(f"captions: expected a list of {frame_count} strings{how_resampled(entry)}")
    return defects


def load_actions(
    root: Path, row: dict, frames: np.ndarray | None, entry: dict, needed: bool
) -> tuple[np.ndarray | None, list[str]]:
    """-> an episode's actions, float32 [T-1 or T, A], or None; and their defects"""
    if row.get("actions") is None:
        missing = ["actions: missing, but this stage needs them"] if needed else []
        return None, missing
    frame_count = None if frames is None else len(frames)
    try:
        return read_actions(path_inside(root, row["actions"]), frame_count), []
    except Exception as error:  # numpy raises several kinds for broken files
        video.refuse_machine_faults(error, root)
        found = f"{video.reason(error)}{how_resampled(entry)}"
        return None, [f"actions: expected numbers [T-1 or T, A] in {row['actions']!r}: {found}"]


def read_actions(path: Path, frame_count: int | None) -> np.ndarray:
    """A .npy of actions as float32; raises ValueError for a shape that does not fit (frame_count
    None: any length fits) and for numbers that are not finite"""
    with np.errstate(over="ignore"):  # too large for float32: infinity
        actions = np.load(path).astype(np.float32, casting="same_kind")
    shape_fits = actions.ndim == 2 and actions.shape[1] > 0
    if not shape_fits or (frame_count and len(actions) not in (frame_count - 1, frame_count)):
        raise ValueError(f"found shape {actions.shape}, T is {frame_count or 'unknown'}")
    broken = np.flatnonzero(~np.isfinite(actions).all(1))
    if len(broken):
        raise ValueError(f"NaN, infinity or a number too large for float32 in row {broken[0]}")
    return actions


def width_defects(episodes: Sequence[Episode]) -> list[tuple[str, str]]:
    """Pairs of id and text for the episodes whose action width differs from most"""
    widths = {e.id: e.actions.shape[1] for e in episodes if e.actions is not None}
    usual = mode(widths.values()) if widths else None
    return [
        (name, f"actions: width {width}, {usual} in most other episodes")
        for name, width in widths.items()
        if width != usual
    ]


# ------------------------------------------------------------------------ frames and their codes
def to_float(frames: np.ndarray, device: torch.device | None = None) -> Tensor:
    """uint8 [.., H, W, 3] -> float32 [.., 3, H, W] in [0, 1] on the device (None: the CPU)"""
    x = torch.from_numpy(np.ascontiguousarray(frames))
    if device is not None and device.type == "cuda":  # sent as bytes, asynchronously
        x = x.pin_memory().to(device, non_blocking=True)
    return x.movedim(-1, -3).float() / 255


class ImageTokenizer(Protocol):
    """What the stages use of official.vqgan.VQGAN"""

    config: Any  # its shape, a dataclass
    mark: str  # hash of its weights
    file: Path  # the weights

    def encode(self, images: Tensor) -> Tensor:
        """float [B, 3, S, S] in [-1, 1] -> codes int64 [B, N]"""


def open_vqgan(path: str, option: str, device: torch.device, shape: dict) -> ImageTokenizer | None:
    """The image tokenizer beside a VLA of that shape (its config): see official/vqgan.py.  None
    for a VLA that reads linear patches.  Refuses a VLA that reads no images."""
    if not shape["patch_size"]:
        fail(f"--{option} {latest(path)}: a text-only model reads no images")
    if not shape["vision_vocab"]:
        return None
    try:
        from official.vqgan import load_vqgan  # only models with image codes need it
    except ModuleNotFoundError as error:
        if error.name not in ("official", "official.vqgan"):
            raise
        fail(f"--{option} {latest(path)}: it reads image codes, which need the folder official/")
    return load_vqgan(path, option, device, shape)


# ------------------------------------------------------------------------ windows and batches
def window_frames(seconds: float, fps: float) -> int:
    """A window in seconds -> H in whole frames of an episode, at least 1 (0.6 s at 5 fps: 3)"""
    return max(1, int(seconds * fps + 0.5))


def future_index(t: int | Sequence[int] | np.ndarray, length: int, window: int) -> np.ndarray:
    """t -> t + H, at most the last of an episode's `length` frames (as in the official code;
    window: H in frames)"""
    return np.minimum(np.asarray(t) + window, length - 1)


def frame_pairs(
    episodes: Sequence[Episode], samples: Sequence[tuple[int, int]], seconds: float
) -> np.ndarray:
    """samples: B pairs (episode index, t) -> uint8 [B, 2, S, S, 3]: x_t and x_{t+H}"""
    pairs = []
    for e, t in samples:
        frames = episodes[e].frames
        later = future_index(t, len(frames), window_frames(seconds, episodes[e].fps))
        pairs.append(frames[[t, later]])
    return np.stack(pairs)


def draw(seed: int, step: int, count: int, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """`count` random samples (clip index, frame), a pure function of seed and step: a random frame
    of a random clip, as the official code draws them.  lengths: frames of each clip"""
    rng = np.random.default_rng((seed, step))
    clips = rng.integers(len(lengths), size=count)
    return [(int(clip), int(rng.random() * lengths[clip])) for clip in clips]


class FrameSampler:
    """The frames of each step's batch, a pure function of the seed and the step: see draw.

    episodes: where they come from; frame_counts: of each, how many frames have an answer;
    local_rows: the part of the global batch that this process reads"""

    def __init__(
        self,
        episodes: Sequence[Episode],
        frame_counts: Sequence[int],
        seed: int,
        global_batch: int,
        local_rows: slice,
    ) -> None:
        self.episodes = episodes
        self.frame_counts = frame_counts
        self.seed = seed
        self.global_batch = global_batch
        self.local_rows = local_rows

    def frames(self, step: int) -> list[tuple[int, int]]:
        """-> (episode index, frame) of each row that this process reads"""
        return draw(self.seed, step, self.global_batch, self.frame_counts)[self.local_rows]

    def episode_ids(self, step: int) -> list[str]:
        """The names of the episodes of these rows"""
        return [self.episodes[episode].id for episode, _ in self.frames(step)]


def stream(
    make: Callable[[int], Batch], start: int, stop: int, workers: int = 1, ahead: int = 3
) -> Iterator[Batch]:
    """Yield make(step) for step in start..stop-1, always in order; up to `ahead` of them are
    prepared in the background."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[Future] = []
        for step in range(start, stop + ahead):
            if step < stop:
                waiting.append(pool.submit(make, step))
            if step >= start + ahead:
                yield waiting.pop(0).result()


def random_shift(
    pictures: Tensor, share: float, global_batch: int | None = None, local_rows: slice = slice(None)
) -> Tensor:
    """Move the pictures of each row [B, .., H, W] by one random offset of up to `share` of their
    size; edges are replicated.

    Each of several processes draws the offsets of all `global_batch` rows (None: B) and uses those
    of its `local_rows`, so a step does not depend on how many processes share it."""
    rows, height, width = len(pictures), pictures.shape[-2], pictures.shape[-1]

    def shifted_places(length: int) -> Tensor:
        """Where each pixel of a side comes from, [B, length]"""
        most = int(share * length)
        offsets = torch.randint(-most, most + 1, (global_batch or rows, 1))[local_rows]  # B, 1
        return (torch.arange(length) + offsets).clamp(0, length - 1).to(pictures.device)

    y = shifted_places(height)[:, :, None]  # B, H, 1
    x = shifted_places(width)[:, None, :]  # B, 1, W
    row = torch.arange(rows, device=pictures.device)[:, None, None]  # B, 1, 1
    return pictures[row, ..., y, x].movedim((1, 2), (-2, -1))  # B, H, W, .. -> B, .., H, W


# ------------------------------------------------------------------------ labels
def save_labels(path: str | Path, labels: dict[str, np.ndarray], meta: dict) -> None:
    """Write one label per frame, for stage 2 to predict, into a safetensors file.

    labels: episode id -> int [T, K], latent codes (stored as uint16), or float [T, A], actions that
    an inverse dynamics model guessed (stored as float32)
    meta: JSON in the file's header; load_labels needs its `dataset`, the dataset's fingerprint"""
    packed = {}
    for name, rows in labels.items():
        dtype = np.float32 if np.issubdtype(rows.dtype, np.floating) else np.uint16
        packed[name] = torch.from_numpy(np.ascontiguousarray(rows, dtype))
    with refuse(f"{path}: not written", (OSError, SafetensorError)), atomically(path) as draft:
        save_file(packed, draft, {"meta": to_json(meta)})


def load_labels(
    path: str | Path, dataset: Dataset, episodes: Sequence[Episode]
) -> tuple[list[np.ndarray], dict]:
    """-> one array per episode, int64 [T, K] codes or float32 [T, A] actions; the labels' meta.

    Refuses labels of another dataset, and episodes without a label for each frame."""
    hint = "quantize.py label makes latent actions, baselines/inverse_dynamics.py robot actions"
    broken = (OSError, SafetensorError, TypeError, KeyError, ValueError)
    with refuse(f"{path}: no labels there ({hint})", broken), safe_open(path, "numpy") as file:
        meta = json.loads(file.metadata()["meta"])
        made_for = meta["dataset"]
        names = file.keys()
        found = {name: file.get_tensor(name) for name in names}
    if made_for != dataset.fingerprint:
        fail(
            f"{path}: made for another dataset ({made_for}), not {dataset.path} "
            f"({dataset.fingerprint})"
        )
    labels = []
    for episode in episodes:
        rows = found.get(episode.id, np.empty(0))
        wanted = len(episode.frames)
        if len(rows) != wanted:
            fail(f"{path}: episode {episode.id!r} has {len(rows)} labels, expected {wanted}")
        if not np.isfinite(rows).all():
            fail(f"{path}: episode {episode.id!r} has labels that are not finite")
        dtype = np.float32 if np.issubdtype(rows.dtype, np.floating) else np.int64
        labels.append(rows.astype(dtype))
    return labels, meta


# ------------------------------------------------------------------------ where bins are made
# An action becomes one token per dimension: the number of the bin that its value falls into (paper
# 3.3).  `edges` holds one float64 array per dimension: n+1 rising numbers are the edges of n bins;
# a repeated first number begins a list of n values (docs/formats.md, "Checkpoints").
FEW = 16  # a dimension with up to that many distinct values has one bin for each of them


def fit_bins(actions: np.ndarray, bins: int = 256, binary: str = "") -> list[np.ndarray]:
    """Cut every dimension of actions, float [M, A], into bins -> edges, A float64 arrays.

    A dimension of few values (a gripper's -1 and 1, a key's -1, 0, 1) has one bin for each value
    and decodes to exactly that: see bins_of_values.  Any other has up to `bins` bins of equal
    count: see quantile_edges.  `binary` ("6": the gripper is dimension 6) names dimensions that
    have two values: see binary_bins."""
    dimensions = actions.shape[1]
    named = binary.split(",") if binary else []
    if not {*named} <= {*map(str, range(dimensions))}:
        fail(f"--binary {binary!r}: expected dimensions 0 to {dimensions - 1}, comma-separated")
    edges = []
    for dimension in range(dimensions):
        column = actions[:, dimension].astype(np.float64)
        values = distinct_values(column)
        if str(dimension) in named:
            edges.append(binary_bins(dimension, column, values, bins))
        elif len(values) <= min(FEW, bins):
            edges.append(bins_of_values(values))
        else:
            edges.append(quantile_edges(column, bins))
    return edges


def quantile_edges(column: np.ndarray, bins: int) -> np.ndarray:
    """Edges of up to `bins` bins of equal count, as pandas' qcut cuts them (official); duplicate
    edges are dropped, so fewer bins may remain"""
    return np.unique(np.quantile(column.astype(np.float64), np.linspace(0, 1, bins + 1)))


def bins_of_values(values: np.ndarray) -> np.ndarray:
    """One bin for each of these values, in rising order.  Edges never repeat, so a repeated
    first number marks a list of values; a single value stays as it is."""
    return values if len(values) == 1 else np.concatenate([values[:1], values])


def binary_bins(dimension: int, column: np.ndarray, values: np.ndarray, bins: int) -> np.ndarray:
    """Bins of a dimension that --binary names, given its column and its distinct values.

    For 0, 1 and, if they are more than a few, values in between: the official edges, which decode
    to 0 and 1.  For a few other values: one bin for each.  For two clusters: one bin at each
    cluster's median.  Refuses anything else."""
    few = len(values) <= min(FEW, bins)
    between_0_and_1 = values[0] > -0.1 and values[-1] < 1.1
    if {*values} <= {0.0, 1.0} or (between_0_and_1 and not few):
        return np.array([-0.5, 0.5, 1.5])
    if few:
        return bins_of_values(values)
    high = column > (values[0] + values[-1]) / 2
    low_median, high_median = np.median(column[~high]), np.median(column[high])
    distance = np.abs(column - np.where(high, high_median, low_median)).mean()
    if distance > 0.05 * np.ptp(values):
        fail(
            f"--binary {dimension}: dimension {dimension} has {len(values)} values from "
            f"{values[0]:g} to {values[-1]:g}, expected two, or values between 0 and 1"
        )
    return bins_of_values(np.array([low_median, high_median]))


def distinct_values(column: np.ndarray) -> np.ndarray:
    """The distinct values of a column, in rising order.  Where these are a few clusters that only
    the rounding of float32 spreads (1 and 0.9999999), the most frequent value of each cluster"""
    values, counts = np.unique(column, return_counts=True)
    rounding = 1e-6 * np.abs(values).max()
    borders = np.flatnonzero(np.diff(values) > rounding) + 1
    clusters = np.split(np.arange(len(values)), borders)  # indices into values
    if len(clusters) > FEW or any(np.ptp(values[cluster]) > rounding for cluster in clusters):
        return values
    return np.array([values[cluster[counts[cluster].argmax()]] for cluster in clusters])


# ------------------------------------------------------------------------ where bins are used
def lists_values(array: np.ndarray) -> bool:
    """Whether a dimension's array lists the values of its bins, not their edges"""
    return len(array) == 1 or array[0] == array[1]


def to_bins(actions: np.ndarray, edges: Sequence[np.ndarray]) -> np.ndarray:
    """float [.., A] -> int64 [.., A]: the bin whose left edge is the last one <= the value, or the
    nearest value of a list.  Only inner borders count: what lies outside falls into an end bin."""
    columns = []
    for dimension, array in enumerate(edges):
        inner = (array[1:-1] + array[2:]) / 2 if lists_values(array) else array[1:-1]
        columns.append(np.searchsorted(inner, actions[..., dimension], side="right"))
    return np.stack(columns, -1).astype(np.int64)


def from_bins(indices: np.ndarray, edges: Sequence[np.ndarray]) -> np.ndarray:
    """int [.., A] -> float64 [.., A]: the middle of each bin, or its value.  An index past the last
    bin counts as the last."""
    columns = []
    for dimension, array in enumerate(edges):
        middles = (array[1:] + array[:-1]) / 2
        decoded = array[-bin_count(array) :] if lists_values(array) else middles
        columns.append(decoded.take(indices[..., dimension], mode="clip"))
    return np.stack(columns, -1)


def bin_count(array: np.ndarray) -> int:
    """Bins of a dimension"""
    return max(1, len(array) - 1)


def soft_widths(edges: Sequence[np.ndarray], soft: float) -> list[float] | float:
    """The width `soft` of a target's Gaussian for each dimension; 0 where there are so few bins
    that none is nearly right: smoothed, a gripper's two would hardly differ"""
    return [0.0 if len(array) <= FEW + 1 else soft for array in edges] if soft else 0.0


def describe_bins(edges: Sequence[np.ndarray], actions: np.ndarray) -> str:
    """How many bins each dimension has, and how far off they are for actions float [M, A]"""
    errors = np.abs(from_bins(to_bins(actions, edges), edges) - actions).mean(0)
    described = []
    for dimension, array in enumerate(edges):
        column = actions[:, dimension]
        values, count = distinct_values(column.astype(np.float64)), bin_count(array)
        if errors[dimension] > 1e-6 * np.abs(column).max():
            lost = f"off by {errors[dimension]:.2g} on average"
            described.append(f"{count} for {len(values)} values ({lost})")
        elif count > 1:
            described.append(f"{count} (one per value)")
        else:
            described.append(f"1 (always {values[0]:g})")
    return "bins per dimension: " + ", ".join(described)


def refuse_other_values(
    edges: Sequence[np.ndarray], actions: np.ndarray, whose: str, guessed: bool = False
) -> None:
    """Refuse actions float [M, A] that bins made from other data would turn into other values: a
    gripper's -1 and 1 where these are for 0 and 1, millimeters where they are for meters.

    whose: the option that the bins come from, for the message
    guessed: the bins come from guesses of the same actions, so only few values are refused"""
    decoded = from_bins(to_bins(actions, edges), edges)
    for dimension, array in enumerate(edges):
        column, bin_values = actions[:, dimension], decoded[:, dimension]
        error = np.sqrt(((bin_values - column) ** 2).mean())
        spread = max(column.std(), 0.001 * np.ptp(array), 1e-9)
        tolerated = guessed and len(np.unique(column)) > FEW
        if error > 0.5 * spread and not tolerated:
            fail(
                f"{whose}: its bins were made for other values of dimension {dimension}: "
                f"{column.min():g} to {column.max():g} becomes "
                f"{bin_values.min():g} to {bin_values.max():g}; "
                "scale the actions as in pretraining, or pretrain on these"
            )


def r2(guess: np.ndarray, target: np.ndarray) -> list[float | None]:
    """Share of the variance of target [M, A] that guess [M, A] explains, per dimension; None for
    one that is constant"""
    error = ((guess - target) ** 2).sum(0)
    spread = ((target - target.mean(0)) ** 2).sum(0)
    moves = spread > 1e-20 * (target**2).sum(0)  # more than rounding does
    return [
        1 - float(e) / float(s) if m else None for e, s, m in zip(error, spread, moves, strict=True)
    ]


# ------------------------------------------------------------------------ command line
def main(words: list[str]) -> None:
    """data.py check DATASET"""
    if {"-h", "--help"} & {*words}:
        print(__doc__.strip())
    elif len(words) == 2 and words[0] == "check":
        dataset = open_dataset(words[1], 64)
        frames = sum(len(e.frames) for e in dataset.episodes)
        with_actions = sum(e.actions is not None for e in dataset.episodes)
        print(
            f"{words[1]}: {len(dataset.episodes)} episodes, {frames} frames, {with_actions} with "
            f"actions, fingerprint {dataset.fingerprint}: no defects"
        )
    else:
        fail("expected: data.py check DATASET")


if __name__ == "__main__":
    main(sys.argv[1:])
