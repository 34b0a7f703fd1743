"""Episodes on disk -> frames, windows, token sequences and action bins.

    python data.py check DATASET                       every defect at once
    python data.py tabletop data/tabletop              make the built-in dataset
    python data.py tabletop data/scenes --scenes 12000 still scenes with captions

A dataset is a folder with `episodes.jsonl`, one episode a line:
    id           unique name                      instruction  what the robot or person was told
    video        a video file, a folder of images, or a .npy uint8 [T, H, W, 3]; path inside DATASET
    fps          frames a second (a video file may leave it out)
    frames       optional T, checked              actions      optional .npy float [T-1 or T, A]
    captions     optional list of T strings       others       carried along, for `--where a=b`"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from statistics import mode
from tempfile import TemporaryFile
from threading import Lock

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

import tabletop
from common import atomically, fail, latest, load_strictly, parse_options, refuse
from model import ACTION, END_OF_IMAGE, LATENT, TEXT, VISION, VQGAN, VQGANConfig

LOADING = Lock()  # CPython 3.11 parses .npy headers wrongly when several threads do it at once
FFMPEG_HINT = "ffmpeg is not installed (apt install ffmpeg, or pip install imageio-ffmpeg)"

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
    key: str = ""  # of the frames in the cache
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
    return [known[i] for i in np.random.default_rng(seed).permutation(len(known))[:count or None]]

def open_dataset(path, size, where="", actions_needed=False, official=False):
    """Validate a dataset and open it at size x size pixels; exits with every defect listed.

    Only the episodes that match `where` ("embodiment=robot,task=push") are decoded and returned;
    official: their frames are resized as LWM's VQGAN expects, not as the LAQ does."""
    path = Path(path)
    index = path / "episodes.jsonl"
    rows, problems = _read_rows(index)
    conditions = [part.partition("=") for part in where.split(",") if part]
    if not all(name and value for name, _, value in conditions):
        fail(f"--where {where!r}: expected name=value, comma separated")
    rows = [r for r in rows if all(str(r.get(name)) == value for name, _, value in conditions)]
    if not rows and not problems:
        fail(f"{index}: no episode" + (f" with {where}" if where else ""))

    load = lambda row: _load_episode(path, row, size, actions_needed, official)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        loaded = list(tqdm(pool.map(load, rows), total=len(rows), desc=f"frames of {path.name}",
                           disable=len(rows) < 2, leave=False, mininterval=0.5))
    problems += [f"{index}: episode {row['id']!r}: field {text}"
                 for row, (_, bad) in zip(rows, loaded) for text in bad]
    episodes = [episode for episode, _ in loaded if episode is not None]
    widths = {e.id: e.actions.shape[1] for e in episodes if e.actions is not None}
    usual = mode(widths.values()) if widths else None
    problems += [f"{index}: episode {name!r}: field actions: width {width}, {usual} in most other "
                 "episodes" for name, width in widths.items() if width != usual]
    if problems:
        shown = "\n  ".join(problems)
        fail(f"{len(problems)} defects in {path}\n  {shown}" if problems[1:] else shown)
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
        elif not isinstance(row.get("id"), str) or not row["id"]:
            problems.append(f"{index}: line {number}: field id: expected a name")
        elif row["id"] in rows:
            problems.append(f"{index}: episode {row['id']!r}: field id: duplicate (line {number})")
        else:
            rows[row["id"]] = row
    return list(rows.values()), problems

def _inside(root, text):
    """A path of the dataset, as episodes.jsonl gives it: relative, and never out of it"""
    if not isinstance(text, str) or not text or os.path.isabs(text) or ".." in Path(text).parts:
        raise ValueError("expected a path inside the dataset")
    return root / text

def _load_episode(root, row, size, actions_needed, official):
    """-> Episode (None where it has defects), and "field: text" of each defect"""
    video, instruction, fps, captions = map(row.get, ("video", "instruction", "fps", "captions"))
    frames = key = actions = T = None
    bad = []
    try:
        path = _inside(root, video)
        frames, key = cached_frames(path, size, official)
        T = len(frames)
        if fps is None and path.is_file() and path.suffix != ".npy":
            fps = _probe_fps(path)
    except Exception as error:  # a decoder may raise anything
        bad.append(f"video: {video!r} cannot be decoded: {type(error).__name__}: {error}")
    if row.get("actions") is not None:
        try:
            actions = _load_actions(_inside(root, row["actions"]), T)
        except Exception as error:
            bad.append(f"actions: expected numbers [T-1 or T, A] in {row['actions']!r}: "
                       f"{type(error).__name__}: {error}")
    elif actions_needed:
        bad.append("actions: missing, and this stage needs labelled episodes")
    wanted = (
        (isinstance(instruction, str) and instruction.strip(),
         f"instruction: expected words, found {instruction!r}"),
        (type(fps) in (int, float) and 0 < fps < 2**63,
         f"fps: expected frames a second, found {fps!r}"),
        (T is None or T > 1, f"video: {video} holds {T} frame, expected at least 2"),
        (T is None or row.get("frames", T) == T,
         f"frames: says {row.get('frames')!r}, but {video} holds {T}"),
        (T is None or captions is None or
         isinstance(captions, list) and [type(c) for c in captions] == [str] * T,
         f"captions: expected a list of {T} strings"))
    bad += [text for good, text in wanted if not good]
    if bad:
        return None, bad
    return Episode(row["id"], instruction.strip(), float(fps), row, frames, actions, key), bad

def _load_actions(path, T):
    with LOADING:
        actions = np.load(path).astype(np.float32, casting="same_kind")
    if actions.ndim != 2 or actions.shape[1] == 0 or T and len(actions) not in (T - 1, T):
        raise ValueError(f"found shape {actions.shape}, T is {T or 'unknown'}")
    broken = np.flatnonzero(~np.isfinite(actions).all(1))
    if len(broken):
        raise ValueError(f"found NaN or infinity, first in row {broken[0]}")
    return actions

# ------------------------------------------------------------------------ frames and their codes
def cached_frames(video, size, official=False):
    """Frames of one video at size x size as a memory-mapped uint8 array [T, size, size, 3], and a
    key that is its own in the cache.

    Decoded once into $LAPA_CACHE (default .cache here), one file an episode, which appears whole:
    killed runs and two processes do no harm.  Raises what its decoder does."""
    parts, source = [video], _decode(video)  # which runs only once it is read from
    if video.is_dir():  # its pictures in natural order: img_2 before img_10
        natural = lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p.name)]
        pictures = (p for p in video.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        parts = sorted(pictures, key=natural)
        source = (np.asarray(Image.open(p).convert("RGB")) for p in parts)
    stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in parts]
    key = hashlib.sha256(repr((str(video.resolve()), stamps)).encode()).hexdigest()[:24]
    if video.suffix == ".npy":
        with LOADING:
            source = np.load(video, mmap_mode="r")
        if source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3:
            raise ValueError(f"{source.dtype} {source.shape}, expected uint8 (T, H, W, 3)")
        if source.shape[1:3] == (size, size):
            return source, key
    cached = _cache(f"frames_{size}" + "_official" * official, key)
    if not cached.is_file():
        frames = [(official_resize if official else resize)(frame, size) for frame in source]
        with atomically(cached) as draft:
            np.save(draft, np.array(frames, np.uint8).reshape(-1, size, size, 3))
    with LOADING:
        return np.load(cached, mmap_mode="r"), key

def _cache(kind, key):
    return Path(os.environ.get("LAPA_CACHE", ".cache")) / kind / f"{key}.npy"

def resize(frame, size):
    """uint8 [H, W, 3] -> [size, size, 3]: PIL bilinear, antialiased (official LAQ preprocessing)"""
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.BILINEAR))

def official_resize(frame, size):
    """uint8 [H, W, 3] -> [size, size, 3]: the longest side to `size`, then to the square, each as
    OpenCV's bilinear resize does, to the bit (official VLA preprocessing; no antialiasing)"""
    def taps(source, goal):  # two neighbours and their weights, in units of 1/2048
        place = ((np.arange(goal) + 0.5) * (source / goal) - 0.5).astype(np.float32)
        at, share = np.floor(place).astype(int), np.rint(place % 1 * 2048).astype(int)
        return at.clip(0, source - 1), (at + 1).clip(0, source - 1), 2048 - share, share
    scale = size / max(frame.shape[:2])
    for height, width in ([max(1, round(n * scale)) for n in frame.shape[:2]], (size, size)):
        a, b, u, v = taps(frame.shape[1], width)
        x = frame[:, a] * u[:, None] + frame[:, b] * v[:, None]
        a, b, u, v = taps(frame.shape[0], height)
        x = ((x[a] >> 4) * u[:, None, None] >> 16) + ((x[b] >> 4) * v[:, None, None] >> 16)
        frame = ((x + 2) >> 2).astype(np.uint8)
    return frame

@lru_cache
def _ffmpeg():
    """-> ffmpeg, and its option that hands every frame over once; versions before 5.1 differ"""
    try:
        program = shutil.which("ffmpeg") or import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise ValueError(FFMPEG_HINT) from None
    known = subprocess.run([program, "-hide_banner", "-h", "long"], capture_output=True).stdout
    return program, "-fps_mode" if b"-fps_mode" in known else "-vsync"

def _decode(video):
    """Yield the frames uint8 [H, W, 3] of a video file; ffmpeg hands them over as PPM pictures."""
    program, each_once = _ffmpeg()
    pictures = f"-map 0:v:0 {each_once} passthrough -f image2pipe -c:v ppm -pix_fmt rgb24 -"
    command = [program, *"-v error -nostdin -threads 1 -i".split(), video, *pictures.split()]
    with TemporaryFile() as said:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as process:
            pipe = process.stdout
            while pipe.readline() == b"P6\n":
                width, height = map(int, pipe.readline().split())
                pipe.readline()  # 255
                data = pipe.read(width * height * 3)
                if len(data) < width * height * 3:
                    break
                yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
        said.seek(0)
        complaint = said.read().decode(errors="replace").strip()
    if process.returncode or complaint:
        raise ValueError((complaint or f"ffmpeg exit code {process.returncode}").splitlines()[-1])

def _probe_fps(video):
    text = subprocess.run([_ffmpeg()[0], "-nostdin", "-i", str(video)], capture_output=True).stderr
    found = re.search(rb"([\d.]+) fps", text)
    return float(found[1]) if found else None

def to_float(frames, device=torch.device("cpu")):
    """uint8 [.., H, W, 3] -> float32 tensor [.., 3, H, W] in [0, 1] on the device"""
    x = torch.from_numpy(np.ascontiguousarray(frames))
    if device.type == "cuda":  # as bytes, and nobody waits for it
        x = x.pin_memory().to(device, non_blocking=True)
    return x.movedim(-1, -3).float() / 255

def load_vqgan(path, option, device, shape):
    """The image tokenizer beside a VLA of that shape (its config) -> VQGAN, frozen, with its `file`
    on disk; None for a VLA that reads linear patches.  Refuses one that reads no images."""
    folder, patch = latest(path), shape["patch_size"]
    if not patch:
        fail(f"--{option} {folder}: a model of text alone, it reads no images")
    if not shape["vision_vocab"]:
        return None
    with refuse(f"--{option} {folder}: expected a VQGAN, as convert.py puts it beside a model",
                (KeyError, TypeError, OSError, ValueError, SafetensorError)):
        vqgan = VQGAN(VQGANConfig(**json.loads((folder / "config.json").read_text())["vqgan"]))
        vqgan.file = folder / "vqgan.safetensors"
        load_strictly(vqgan, load_file(vqgan.file))
        found = 2 ** (len(vqgan.config.multipliers) - 1), vqgan.config.codebook_size
        if found[0] != patch or not found[1] <= END_OF_IMAGE < shape["vision_vocab"]:
            raise ValueError(f"{found[1]} codes for {found[0]} pixels each do not fit a model of "
                             f"{shape['vision_vocab']} for {patch}")
    return vqgan.to(device).eval()

def add_codes(episodes, vqgan, processes):
    """Give episodes the codes of their frames, uint16 [T, N] memory-mapped: made once, beside the
    frame cache, each process its share, under the VQGAN's hash"""
    mark = hashlib.sha256(vqgan.file.read_bytes()).hexdigest()[:12]
    path = lambda e: _cache(f"codes_{mark}_{e.frames.shape[1]}", e.key)
    missing = [e for e in episodes[processes.rank::processes.world] if not path(e).is_file()]
    for e in tqdm(missing, "image codes", mininterval=1.0, leave=False, disable=not processes.main):
        codes = [vqgan.encode(to_float(np.array(e.frames[t:t + 16]), processes.device) * 2 - 1)
                 for t in range(0, len(e.frames), 16)]
        with atomically(path(e)) as draft:
            np.save(draft, torch.cat(codes).cpu().numpy().astype(np.uint16))
    processes.barrier()
    for e in episodes:
        e.codes = np.load(path(e), mmap_mode="r")

def put_codes(tokens, kinds, codes):
    """tokens, kinds [B, L], codes [B, N] -> tokens with codes and END_OF_IMAGE where vision is"""
    image = torch.cat((codes, torch.full_like(codes[:, :1], END_OF_IMAGE)), dim=1)
    vision = kinds == VISION
    return torch.where(vision, image.gather(1, (vision.cumsum(1) - 1).clamp(min=0)), tokens)

def augment(batch, share, vqgan, *part):
    """Move a batch's pictures by random offsets (wherever a camera looks, the motion is the same);
    a VQGAN then reads them anew.  At share 0 the batch as it is; part: see random_shift."""
    if not share:
        return batch
    images = random_shift(batch["images"], share, *part)
    if vqgan is None:
        return {**batch, "images": images}
    codes = vqgan.encode(images)
    return {**batch, "images": None, "tokens": put_codes(batch["tokens"], batch["kinds"], codes)}

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
        save_file(packed, draft, {"meta": json.dumps(meta)})

def load_labels(path, dataset, episodes):
    """-> list of int64 [T, K], one an episode, and the labels' meta.  Refuses another dataset's."""
    with refuse(f"{path}: no labels there (make them with quantize.py label)",
                (OSError, SafetensorError, TypeError, KeyError, ValueError)), \
            safe_open(path, "numpy") as file:
        meta = json.loads(file.metadata()["meta"])
        found = {name: file.get_tensor(name).astype(np.int64) for name in file.keys()}
    if meta["dataset"] != dataset.fingerprint:
        fail(f"{path}: made for another dataset ({meta['dataset']}) than {dataset.path} "
             f"({dataset.fingerprint})")
    for e in episodes:
        if (count := len(found.get(e.id, ()))) != len(e.frames):
            fail(f"{path}: episode {e.id!r} has {count} labels, expected {len(e.frames)}")
    return [found[e.id] for e in episodes], meta

def fit_bins(actions, bins=256, binary=""):
    """Edges of up to `bins` bins of equal count a dimension (paper 3.3), as pandas' qcut cuts them.

    actions float [M, A]; quantiles of the rows, duplicate edges dropped, so fewer bins may remain.
    A dimension listed in `binary` ("6": a gripper) has two bins with edges -0.5, 0.5, 1.5.  A
    constant dimension keeps its one value.  -> list of A float64 arrays"""
    grid, A, two = np.linspace(0, 1, bins + 1), actions.shape[1], binary.split(",")
    if binary and not {*two} <= {*map(str, range(A))}:
        fail(f"--binary {binary!r}: expected dimensions of 0 to {A - 1}, comma separated")
    return [np.array([-0.5, 0.5, 1.5]) if str(a) in two else
            np.unique(np.quantile(actions[:, a].astype(np.float64), grid)) for a in range(A)]

def to_bins(actions, edges):
    """float [.., A] -> int64 [.., A]: the bin whose left edge is the last one <= the value; values
    outside fall into the end bins, since only the inner edges count"""
    columns = [np.searchsorted(e[1:-1], actions[..., a], side="right") for a, e in enumerate(edges)]
    return np.stack(columns, -1).astype(np.int64)

def from_bins(indices, edges):
    """int [.., A] -> float64 [.., A]: the middle of each bin; past the last bin counts as last"""
    middles = [(e[1:] + e[:-1]) / 2 if len(e) > 1 else e for e in edges]
    return np.stack([m.take(indices[..., a], mode="clip") for a, m in enumerate(middles)], -1)

# ------------------------------------------------------------------------ words and sequences
PAD, BOS, EOS = 0, 1, 2
OFFICIAL_TEMPLATE = ("<s> You are a helpful assistant. USER: What action should the robot take to "
                     "`{instruction}` ASSISTANT:")
TAGS = {LATENT: ("<delta>", "</delta>"), ACTION: ("<action>", "</action>"), TEXT: ("", "")}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<vision>", "</vision>", *TAGS[LATENT], *TAGS[ACTION]]

def train_tokenizer(texts):
    """A word-level tokenizer over all words of `texts`, lower case; tags are words of their own"""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer

def dataset_tokenizer(dataset):
    """DATASET/tokenizer.json where there is one, else words of the dataset's own instructions"""
    if (dataset.path / "tokenizer.json").is_file():
        return read_tokenizer(dataset.path)
    return train_tokenizer([text for e in dataset.episodes
                            for text in (e.instruction, *(e.info.get("captions") or ()))])

def read_tokenizer(folder):
    """tokenizer.json of a dataset or of a checkpoint of stage 2 or 3, in the library's format"""
    path = latest(folder) / "tokenizer.json"
    with refuse(f"{path}: no tokenizer", Exception):  # the library raises nothing more precise
        return Tokenizer.from_file(str(path))

def opening_tags(tokenizer):
    """Vocabulary -> the token behind which its answers begin; refuses a tokenizer that spells it"""
    tags = {kind: tokenizer.token_to_id(TAGS[kind][0]) for kind in (LATENT, ACTION)}
    if None in tags.values():
        fail("--like_tag: the tokenizer has no token for <delta> or <action>")
    return tags

class Sequences:
    """Instruction + image + answer -> one row of tokens (official layout, formats section 5).

    bos, text, <vision> image </vision>, <delta> codes </delta>, eos.  An answer is latent codes
    (`<delta>`), action bins (`<action>`) or plain text (a caption, no tags).  `length`: cut or pad
    training rows to it (0: pad to the longest); official_cut moves their mask one step too far."""

    def __init__(self, tokenizer, image_tokens, template="{instruction}", length=0,
                 official_cut=False):
        self.tokenizer, self.image_tokens, self.template = tokenizer, image_tokens, template
        self.length, self.official_cut = length, official_cut
        self.words = lru_cache(maxsize=65536)(lambda text: tokenizer.encode(
            text, add_special_tokens=False).ids if text else [])
        with refuse("--template: expected words around {instruction}", (ValueError, LookupError)):
            template.format(instruction="\0").index("\0")

    def prompt(self, instruction, kind):
        """-> (tokens, kinds) up to where the answer begins"""
        opening = [BOS, *self.words(self.template.format(instruction=instruction)),
                   *self.words("<vision>")]
        closing = [*self.words("</vision>"), *self.words(TAGS[kind][0])]
        return opening + [0] * self.image_tokens + closing, \
            [TEXT] * len(opening) + [VISION] * self.image_tokens + [TEXT] * len(closing)

    def rows(self, instructions, answers, kind, codes=None):
        """Training rows, right-padded (with id 1, as official) and shifted by one.

        answers: int [B, n] codes or bins, or B strings; codes: int64 [B, N] of the images.  ->
        tensors [B, L]: tokens, kinds (inputs), targets, target_kinds, mask (answer, tags, eos)."""
        opening, closing = (self.words(tag) for tag in TAGS[kind])
        built = []
        for instruction, answer in zip(instructions, answers):
            tokens, kinds = self.prompt(instruction, kind)
            begin = len(tokens) - len(opening)
            answer = self.words(answer) if kind == TEXT else [int(a) for a in answer]
            tokens = tokens + answer + closing + [EOS]
            kinds = kinds + [kind] * len(answer) + [TEXT] * (len(closing) + 1)
            mask = [0] * begin + [1] * (len(tokens) - begin)
            if self.official_cut and len(tokens) > self.length + 1:
                mask[:self.length + 1] = mask[1:self.length + 1] + [0]
            # The last token, which no input needs, is padding there.
            built.append(torch.tensor([tokens[:-1] + [BOS], tokens, kinds, mask]))
        length = self.length + 1 if self.length else max(row.shape[1] for row in built)
        full = torch.tensor([BOS, BOS, TEXT, 0])[:, None, None].repeat(1, len(built), length)
        for i, row in enumerate(built):
            full[:, i, :row.shape[1]] = row[:, :length]
        if codes is not None:
            full[:2] = put_codes(full[:2], full[2], codes)
        inputs, targets, kinds, mask = full
        return {"tokens": inputs[:, :-1], "kinds": kinds[:, :-1], "targets": targets[:, 1:],
                "target_kinds": kinds[:, 1:], "mask": mask[:, 1:].bool()}

    def batch(self, episodes, answers, kind, which, device):
        """`rows` of frames which [(episode index, t), ..], with their codes or else their pictures:
        images float [B, 3, S, S] in [-1, 1].  answers: an episode's [T, n] array or T strings."""
        chosen = [episodes[e] for e, _ in which]
        stack = lambda field: np.stack([getattr(e, field)[t] for e, (_, t) in zip(chosen, which)])
        codes = None if chosen[0].codes is None else torch.from_numpy(stack("codes").astype(int))
        batch = self.rows([e.instruction for e in chosen], [answers[e][t] for e, t in which], kind,
                          codes)
        batch["images"] = to_float(stack("frames"), device) * 2 - 1 if codes is None else None
        return {name: x if x is None else x.to(device) for name, x in batch.items()}

    def prompts(self, instructions, kind, codes=None, multiple=1):
        """Prompts for generation, left-padded to the longest, or more to a multiple: tokens, kinds
        int64 [B, L], valid bool [B, L].  codes: int64 [B, N] of the images"""
        built = [self.prompt(text, kind) for text in instructions]
        length = -(-max(len(tokens) for tokens, _ in built) // multiple) * multiple
        tokens = torch.tensor([[PAD] * (length - len(t)) + t for t, _ in built])
        kinds = torch.tensor([[TEXT] * (length - len(k)) + k for _, k in built])
        valid = torch.tensor([[False] * (length - len(t)) + [True] * len(t) for t, _ in built])
        return tokens if codes is None else put_codes(tokens, kinds, codes), kinds, valid

# ------------------------------------------------------------------------ the built-in dataset
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

def make_tabletop(options):
    """Write the built-in dataset: whole, or not at all."""
    out = Path(options.out)
    if out.exists():
        fail(f"{out} exists: remove it or choose another folder")
    with refuse(f"{out}"), atomically(out) as draft:
        for name in ("videos", "actions"):
            (draft / name).mkdir(parents=True)
        rows = list(tabletop.scenes(options, draft, (TAGS[LATENT], TAGS[ACTION]))
                    if options.scenes else tabletop.record(options, draft))
        (draft / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        train_tokenizer(tabletop.vocabulary()).save(str(draft / "tokenizer.json"))
    videos = {row["video"]: row["frames"] for row in rows}
    print(f"wrote {out}: {len(rows)} episodes, {sum(videos.values())} frames")

if __name__ == "__main__":
    command, rest = sys.argv[1:2], sys.argv[2:]
    if command == ["tabletop"]:
        make_tabletop(parse_options(TabletopOptions, rest, positional=("out",))[0])
    elif {"-h", "--help"} & {*sys.argv}:
        print(__doc__.strip())
    elif command == ["check"] and len(rest) == 1:
        found = open_dataset(rest[0], 64)
        print(f"{rest[0]}: {len(found.episodes)} episodes, "
              f"{sum(len(e.frames) for e in found.episodes)} frames, "
              f"{sum(e.actions is not None for e in found.episodes)} with actions, "
              f"fingerprint {found.fingerprint}: no defects")
    else:
        fail("expected: data.py check DATASET, or data.py tabletop OUT [options]")
