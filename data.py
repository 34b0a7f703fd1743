"""Episodes on disk -> frames, windows, token sequences and action bins.

    python data.py check DATASET                       every defect at once
    python data.py tabletop data/tabletop              make the built-in dataset
    python data.py tabletop data/scenes --scenes 12000 still scenes with captions

A dataset is a folder with `episodes.jsonl`, one episode a line:
    id           unique name                      instruction  what the robot or person was told
    video        a video file, a folder of images, or a .npy uint8 [T, H, W, 3]; path inside DATASET
    fps          frames a second (a video file may leave it out)
    frames       optional T, checked              actions      optional .npy float [T-1 or T, A]
    captions     optional list of T strings       others       carried along, for `--where a=b`
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock, get_ident

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

import tabletop
from common import fail, parse_options, refuse
from model import ACTION, LATENT, TEXT, VISION

LOADING = Lock()  # CPython 3.11 parses .npy headers wrongly when several threads do it at once
IMAGES = (".jpg", ".jpeg", ".png")
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


@dataclass
class Dataset:
    path: Path
    fingerprint: str  # of episodes.jsonl: labels remember it
    episodes: list = field(default_factory=list)

    def split(self, held_out):
        """-> (training episodes, held-out episodes): those whose `split` is not "train" or, where
        none has that field, the `held_out` ones whose id has the smallest SHA-256, so that adding
        an episode never moves more than one other across."""
        if any("split" in e.info for e in self.episodes):
            late = {e.id for e in self.episodes if e.info.get("split", "train") != "train"}
        else:
            order = sorted(self.episodes, key=lambda e: hashlib.sha256(e.id.encode()).digest())
            late = {e.id for e in order[:held_out]}
        train = [e for e in self.episodes if e.id not in late]
        if not train:
            fail(f"{self.path}: nothing left after holding out {len(late)} episodes (--held_out)")
        return train, [e for e in self.episodes if e.id in late]


def labelled_few(episodes, count, seed):
    """The `count` episodes whose action labels finetuning (and VPT) may use, drawn by seed"""
    known = [e for e in episodes if e.actions is not None]
    if len(known) < count:
        fail(f"--labelled {count}: only {len(known)} episodes with actions are left to learn from")
    return [known[i] for i in np.random.default_rng(seed).permutation(len(known))[:count]]


def parse_where(text):
    """"a=b,c=d" -> [("a", "b"), ("c", "d")]; refuses anything else"""
    pairs = [tuple(part.split("=", 1)) for part in text.split(",") if part]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        fail(f"--where {text!r}: expected name=value, comma separated")
    return pairs


def open_dataset(path, size, where="", actions_needed=False):
    """Validate a dataset and open it at size x size pixels; exits with every defect listed.  Only
    the episodes that match `where` ("embodiment=robot,task=push") are decoded and returned."""
    path = Path(path)
    index = path / "episodes.jsonl"
    if not index.is_file():
        fail(f"{path}: no dataset there (expected {index})")
    rows, problems = _read_rows(index)
    conditions = parse_where(where)
    rows = [r for r in rows if all(str(r.get(k)) == v for k, v in conditions)]
    if not rows and not problems:
        fail(f"{index}: no episode" + (f" with {where}" if where else ""))

    def load(row):
        bad = []
        try:
            episode = _load_episode(path, row, size, actions_needed, bad)
        except Exception as error:  # a decoder's surprise is a defect of this episode
            episode = bad.append(("video", f"{type(error).__name__}: {error}"))
        return episode, [f"{index}: episode {row.get('id')!r}: field {name}: {text}"
                         for name, text in bad]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        loaded = list(tqdm(pool.map(load, rows), total=len(rows), desc=f"frames of {path.name}",
                           disable=len(rows) < 2, leave=False, mininterval=0.5))
    problems += [line for _, lines in loaded for line in lines]
    episodes = [episode for episode, _ in loaded if episode is not None]
    widths = Counter(e.actions.shape[1] for e in episodes if e.actions is not None)
    common_width = widths.most_common(1)[0][0] if widths else None
    problems += [f"{index}: episode {e.id!r}: field actions: width {e.actions.shape[1]}, "
                 f"{common_width} in most other episodes" for e in episodes
                 if e.actions is not None and e.actions.shape[1] != common_width]
    if problems:
        shown = "\n  ".join(problems)
        fail(f"{len(problems)} defects in {path}\n  {shown}" if problems[1:] else shown)
    mark = hashlib.sha256(index.read_bytes()).hexdigest()[:12]
    return Dataset(path, mark, episodes)


def _read_rows(index):
    """-> rows that are JSON objects, and the defects that need no decoding"""
    rows, problems, seen = [], [], Counter()
    with refuse(f"{index}"):
        lines = index.read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            assert isinstance(row, dict)
        except (ValueError, AssertionError):
            problems.append(f"{index}: line {number}: expected one JSON object")
            continue
        if not isinstance(row.get("id"), str) or not row["id"]:
            problems.append(f"{index}: line {number}: field id: expected a name")
            continue
        seen[row["id"]] += 1
        if seen[row["id"]] > 1:
            problems.append(f"{index}: episode {row['id']!r}: field id: duplicate (line {number})")
            continue
        rows.append(row)
    return rows, problems


def _kind(path):
    return "npy" if path.suffix == ".npy" else "folder" if path.is_dir() else "file"


def _inside(root, text):
    """A relative path that stays inside the dataset, or None"""
    if not isinstance(text, str) or not text or Path(text).is_absolute() or \
            ".." in Path(text).parts:
        return None
    return root / text


def _load_episode(root, row, size, actions_needed, bad):
    """-> Episode; appends (field, text) to `bad` for each defect"""
    if not isinstance(row.get("instruction"), str) or not row["instruction"].strip():
        bad.append(("instruction", "expected words, found " + repr(row.get("instruction"))))
    fps, frames, actions, captions = row.get("fps"), None, None, row.get("captions")
    video = _inside(root, row.get("video"))
    if video is None:
        bad.append(("video", f"expected a path inside the dataset, found {row.get('video')!r}"))
    elif not video.exists():
        bad.append(("video", f"{video} does not exist"))
    else:
        try:
            frames = cached_frames(video, size)
            if fps is None and _kind(video) == "file":
                fps = _probe_fps(video)
        except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError on broken PNGs
            bad.append(("video", f"{video} cannot be decoded: {error}"))
    if type(fps) not in (int, float) or not 0 < fps < np.inf:
        bad.append(("fps", f"expected frames a second, found {fps!r}"))
    T = None if frames is None else len(frames)
    if T is not None and T < 2:
        bad.append(("video", f"{video} holds {T} frame, expected at least 2"))
    if T is not None and "frames" in row and row["frames"] != T:
        bad.append(("frames", f"says {row['frames']!r}, but {video} holds {T}"))
    if captions is not None and T is not None and not (
            isinstance(captions, list) and len(captions) == T
            and all(isinstance(c, str) for c in captions)):
        bad.append(("captions", f"expected a list of {T} strings"))
    if row.get("actions") is not None:
        actions = _load_actions(root, row["actions"], T, bad)
    elif actions_needed:
        bad.append(("actions", "missing, and this stage needs labelled episodes"))
    return None if bad else Episode(row["id"], row["instruction"].strip(), float(fps), row, frames,
                                    actions)


def _load_actions(root, text, T, bad):
    path = _inside(root, text)
    if path is None or not path.is_file():
        return bad.append(("actions", f"{path or text} does not exist inside the dataset"))
    try:
        with LOADING:
            actions = np.load(path)
        actions = actions.astype(np.float32, casting="same_kind")
    except (OSError, ValueError, TypeError, EOFError, AttributeError) as error:
        return bad.append(("actions", f"{path} is no array of numbers: {error}"))
    if actions.ndim != 2 or actions.shape[1] == 0 or \
            (T is not None and len(actions) not in (T - 1, T)):
        return bad.append(("actions", f"{path} has shape {actions.shape}, expected "
                           + (f"({T - 1} or {T}, A)" if T else "(T-1 or T, A)")))
    if not np.isfinite(actions).all():
        row = int((~np.isfinite(actions)).any(1).argmax())
        return bad.append(("actions", f"{path} holds NaN or infinity, first in row {row}"))
    return actions


# ------------------------------------------------------------------------ frames

def cached_frames(video, size):
    """Frames of one video at size x size as a memory-mapped uint8 array [T, size, size, 3].

    Decoded once into $LAPA_CACHE (default .cache here), one file an episode, keyed by the source's
    path, size and mtime.  Each file is renamed into place when whole: a killed run continues where
    it stopped, and two processes do no harm.  Raises OSError or ValueError when undecodable."""
    kind = _kind(video)
    if kind == "npy":
        with LOADING:
            array = np.load(video, mmap_mode="r")
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise ValueError(f"{array.dtype} {array.shape}, expected uint8 (T, H, W, 3)")
        if array.shape[1:3] == (size, size):
            return array
    parts = _image_files(video) if kind == "folder" else [video]
    stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in parts]
    key = hashlib.sha256(repr((str(video.resolve()), stamps)).encode()).hexdigest()[:24]
    cached = Path(os.environ.get("LAPA_CACHE", ".cache")) / f"frames_{size}" / f"{key}.npy"
    if not cached.is_file():
        source = array if kind == "npy" else _decode(video) if kind == "file" else \
            map(np.asarray, (Image.open(p).convert("RGB") for p in parts))
        frames = [resize(frame, size) for frame in source]
        cached.parent.mkdir(parents=True, exist_ok=True)
        draft = cached.with_name(f".{key}.{os.getpid()}.{get_ident()}.npy")  # one a thread
        np.save(draft, np.stack(frames) if frames else np.zeros((0, size, size, 3), np.uint8))
        os.replace(draft, cached)
    with LOADING:
        return np.load(cached, mmap_mode="r")


def resize(frame, size):
    """uint8 [H, W, 3] -> [size, size, 3]: PIL bilinear, antialiased (official LAQ preprocessing)"""
    if frame.shape[:2] == (size, size):
        return frame
    return np.asarray(Image.fromarray(frame).resize((size, size), Image.BILINEAR))


def _image_files(folder):
    """Pictures of a folder in natural order: img_2 before img_10"""
    natural = lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p.name)]
    return sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGES), key=natural)


@lru_cache
def _ffmpeg():
    """-> ffmpeg, and its option that hands every frame over once; versions before 5.1 differ"""
    program = shutil.which("ffmpeg")
    if not program:
        try:
            import imageio_ffmpeg
            program = imageio_ffmpeg.get_ffmpeg_exe()
        except (ImportError, RuntimeError):
            raise ValueError(FFMPEG_HINT) from None
    known = subprocess.run([program, "-hide_banner", "-h", "long"], capture_output=True).stdout
    return program, "-fps_mode" if b"-fps_mode" in known else "-vsync"


def _decode(video):
    """Yield the frames uint8 [H, W, 3] of a video file; ffmpeg hands them over as PPM pictures."""
    program, each_once = _ffmpeg()
    command = [program, "-v", "error", "-nostdin", "-threads", "1", "-i", str(video), "-map",
               "0:v:0", each_once, "passthrough", "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt",
               "rgb24", "-"]
    with TemporaryFile() as said, \
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as process:
        pipe = process.stdout
        while pipe.readline() == b"P6\n":
            width, height = map(int, pipe.readline().split())
            pipe.readline()  # 255
            data = pipe.read(width * height * 3)
            if len(data) < width * height * 3:
                break
            yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
        pipe.close()
        process.wait()
        said.seek(0)
        complaint = said.read().decode(errors="replace").strip()
    if process.returncode or complaint:
        raise ValueError((complaint or f"ffmpeg exit code {process.returncode}").splitlines()[-1])


def _probe_fps(video):
    text = subprocess.run([_ffmpeg()[0], "-nostdin", "-i", str(video)], capture_output=True).stderr
    found = re.search(rb"([\d.]+) fps", text)
    return float(found[1]) if found else None


def to_float(frames):
    """uint8 [.., H, W, 3] -> float32 tensor [.., 3, H, W] in [0, 1]"""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float() / 255


# ------------------------------------------------------------------------ windows and batches

def window_frames(seconds, fps):
    """A window in seconds -> H in whole frames of an episode, at least 1 (0.6 s at 5 fps: 3)"""
    return max(1, int(seconds * fps + 0.5))


def future_index(t, length, h):
    """x_{t+H}, clamped to the last frame at the end of an episode (code)"""
    return np.minimum(np.asarray(t) + h, length - 1)


def frame_pairs(episodes, which, window):
    """which [(episode index, t), ..] -> uint8 [B, 2, S, S, 3]: x_t and x_{t+H}"""
    out = []
    for e, t in which:
        frames = episodes[e].frames
        h = window_frames(window, episodes[e].fps)
        out.append(frames[[t, int(future_index(t, len(frames), h))]])
    return np.stack(out)


def draw(seed, step, batch, lengths):
    """`batch` random (clip, frame) pairs, a pure function of (seed, step): a random frame of a
    random clip, as the official code draws them. lengths: frames of each clip."""
    rng = np.random.default_rng((seed, step))
    clips = rng.integers(len(lengths), size=batch)
    return [(int(e), int(rng.random() * lengths[e])) for e in clips]


def stream(make, start, stop, workers=1, ahead=3):
    """Yield make(step) for step in start..stop-1, prepared in the background, always in order."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for step in range(start, stop):
            waiting.append(pool.submit(make, step))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def random_shift(pictures, share):
    """Move the pictures of each row [B, .., H, W] by one random offset of up to `share` of their
    size, edges replicated: every frame of a pair moves alike."""
    B, H, W = len(pictures), *pictures.shape[-2:]
    def shifted(length):
        most = int(share * length)
        offset = torch.randint(-most, most + 1, (B, 1))
        return (torch.arange(length) + offset).clamp(0, length - 1).to(pictures.device)
    at = torch.arange(B, device=pictures.device)[:, None, None]
    moved = pictures.movedim((-2, -1), (1, 2))[at, shifted(H)[:, :, None], shifted(W)[:, None]]
    return moved.movedim((1, 2), (-2, -1))


# ------------------------------------------------------------------------ latent labels

def save_labels(path, labels, meta):
    """labels: episode id -> int [T, K], into one safetensors file whose header holds meta: LAQ
    fingerprint, window, codebook size, dataset mark"""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: rows.astype(np.uint16) for name, rows in labels.items()}, draft,
              {"meta": json.dumps(meta)})
    os.replace(draft, path)


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
        if len(found.get(e.id, ())) != len(e.frames):
            fail(f"{path}: episode {e.id!r} has {len(found.get(e.id, ()))} labels, expected "
                 f"{len(e.frames)}")
    return [found[e.id] for e in episodes], meta


# ------------------------------------------------------------------------ action bins

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
    outside fall into the end bins"""
    columns = [np.clip(np.searchsorted(e, actions[..., a], side="right") - 1, 0, max(len(e) - 2, 0))
               for a, e in enumerate(edges)]
    return np.stack(columns, -1).astype(np.int64)


def from_bins(indices, edges):
    """int [.., A] -> float64 [.., A]: the middle of each bin; an index past a dimension's last bin
    counts as the last"""
    columns = []
    for a, e in enumerate(edges):
        middles = (e[1:] + e[:-1]) / 2 if len(e) > 1 else e
        columns.append(middles[np.clip(indices[..., a], 0, len(middles) - 1)])
    return np.stack(columns, -1)


# ------------------------------------------------------------------------ words and sequences

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<vision>", "</vision>", "<delta>", "</delta>",
           "<action>", "</action>"]
TAGS = {LATENT: ("<delta>", "</delta>"), ACTION: ("<action>", "</action>"), TEXT: ("", "")}


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
    path = dataset.path / "tokenizer.json"
    if path.is_file():
        return read_tokenizer(path)
    return train_tokenizer([text for e in dataset.episodes
                            for text in (e.instruction, *e.info.get("captions", ()))])


def read_tokenizer(path):
    """A tokenizers-library file, e.g. beside a dataset or in a checkpoint of stage 2 or 3"""
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
    (`<delta>`), action bins (`<action>`) or plain text (a caption, no tags)."""

    def __init__(self, tokenizer, image_tokens, template="{instruction}"):
        self.tokenizer, self.image_tokens, self.template = tokenizer, image_tokens, template
        self.words = lru_cache(maxsize=65536)(self._words)
        with refuse("--template: expected words around {instruction}", (ValueError, LookupError)):
            template.format(instruction="\0").index("\0")

    def _words(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def prompt(self, instruction, kind):
        """-> (tokens, kinds) up to where the answer begins"""
        opening = [BOS, *self.words(self.template.format(instruction=instruction)),
                   *self.words("<vision>")]
        closing = [*self.words("</vision>"), *self.words(TAGS[kind][0])]
        return opening + [0] * self.image_tokens + closing, \
            [TEXT] * len(opening) + [VISION] * self.image_tokens + [TEXT] * len(closing)

    def rows(self, instructions, answers, kind):
        """Training rows, right-padded with eos-free padding and shifted by one.

        answers: int [B, n] codes or bins, or B strings.  -> dict of tensors [B, L]: tokens, kinds
        (inputs), targets, target_kinds, mask (bool: the answer with its tags, and eos)."""
        built = []
        for instruction, answer in zip(instructions, answers):
            tokens, kinds = self.prompt(instruction, kind)
            begin = len(tokens) - len(self.words(TAGS[kind][0]))
            answer = self.words(answer) if kind == TEXT else [int(a) for a in answer]
            closing = [*self.words(TAGS[kind][1]), EOS]
            built.append((tokens + answer + closing,
                          kinds + [kind] * len(answer) + [TEXT] * len(closing), begin))
        length = max(len(tokens) for tokens, _, _ in built)
        full = torch.full((3, len(built), length), PAD)
        full[1] = TEXT
        for i, (tokens, kinds, begin) in enumerate(built):
            full[0, i, :len(tokens)] = torch.tensor(tokens)
            full[1, i, :len(tokens)] = torch.tensor(kinds)
            full[2, i, begin:len(tokens)] = 1
        return {"tokens": full[0, :, :-1], "kinds": full[1, :, :-1], "targets": full[0, :, 1:],
                "target_kinds": full[1, :, 1:], "mask": full[2, :, 1:].bool()}

    def batch(self, episodes, answers, kind, which, device):
        """`rows` of frames which [(episode index, t), ..], with their pictures: images float
        [B, 3, S, S] in [-1, 1].  answers: one [T, n] array, or list of T strings, an episode."""
        batch = self.rows([episodes[e].instruction for e, _ in which],
                          [answers[e][t] for e, t in which], kind)
        batch["images"] = to_float(np.stack([episodes[e].frames[t] for e, t in which])) * 2 - 1
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def prompts(self, instructions, kind):
        """Prompts for generation, left-padded: tokens, kinds int64 [B, L], valid bool [B, L]"""
        built = [self.prompt(text, kind) for text in instructions]
        length = max(len(tokens) for tokens, _ in built)
        tokens = torch.tensor([[PAD] * (length - len(t)) + t for t, _ in built])
        kinds = torch.tensor([[TEXT] * (length - len(k)) + k for _, k in built])
        valid = torch.tensor([[False] * (length - len(t)) + [True] * len(t) for t, _ in built])
        return tokens, kinds, valid


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
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with refuse(f"{out}"):
            for name in ("videos", "actions"):
                (draft / name).mkdir(parents=True)
            rows = list(_scenes(options, draft) if options.scenes else _episodes(options, draft))
        with open(draft / "episodes.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        train_tokenizer(tabletop.vocabulary()).save(str(draft / "tokenizer.json"))
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    videos = {row["video"]: row["frames"] for row in rows}
    print(f"wrote {out}: {len(rows)} episodes, {sum(videos.values())} frames")


def _episodes(o, draft):
    """Record the scripted expert; failures are dropped: every video shows its instruction."""
    unseen, kept = set(tabletop.tasks("unseen")), 0
    for part in range(-(-o.episodes // 250) + 1):
        env = tabletop.TableTop(250, o.embodiment, o.look, o.tasks, size=o.size)
        obs, _ = env.reset((o.seed, part))
        images, actions = [obs["image"]], []
        while not env.done.all():
            action = env.expert(o.noise)
            obs, *_ = env.step(action)
            images.append(obs["image"])
            actions.append(action)
        images, actions = np.stack(images, 1), np.stack(actions, 1).astype(np.float32)
        for b in np.flatnonzero(env.success):
            if kept == o.episodes:
                return
            name, T = f"{o.embodiment}_{kept:05d}", env.steps[b] + 1
            np.save(draft / "videos" / f"{name}.npy", images[b, :T])
            np.save(draft / "actions" / f"{name}.npy", actions[b, :T - 1])
            yield {"id": name, "instruction": env.instructions[b], "video": f"videos/{name}.npy",
                   "fps": tabletop.FPS, "frames": int(T), "actions": f"actions/{name}.npy",
                   "task": tabletop.FAMILIES[env.task[b, 0]], "embodiment": o.embodiment,
                   "combination": "unseen" if tuple(env.task[b]) in unseen else "seen"}
            kept += 1
    if kept < o.episodes:
        raise ValueError(f"--noise {o.noise}: the expert reached {kept} goals of {o.episodes}")


def _scenes(o, draft):
    """Still scenes, 100 to a video: what a pretrained vision-language model knows.  Each video is
    an episode that describes the table and, for each thing on it, one that says where it is."""
    parts = -(-o.scenes // 100)
    for part in range(parts):
        embodiment, tags = ("robot", "human")[part % 2], TAGS[(LATENT, ACTION)[part // 2 % 2]]
        env = tabletop.TableTop(100, embodiment, o.look, size=o.size)
        obs, _ = env.reset((o.seed, part))
        video = f"videos/scene_{part:05d}.npy"
        np.save(draft / video, obs["image"])
        said = [("describe the table", env.captions(np.random.default_rng((o.seed, part))))]
        said += [(f"where is the {thing}", [f"{tags[0]} {spot} {tags[1]}"
                                            for spot in env.locate(thing)])
                 for thing in tabletop.THINGS]
        for i, (instruction, captions) in enumerate(said):
            yield {"id": f"scene_{part:05d}_{i}", "instruction": instruction, "video": video,
                   "fps": 1, "frames": 100, "embodiment": embodiment, "captions": captions,
                   "task": "locate" if i else "describe",
                   "split": "val" if 0 < part >= parts - 2 else "train"}


def check(path):
    """Open a dataset, which names every defect, and say what is in it"""
    found = open_dataset(path, 64)
    known = sum(e.actions is not None for e in found.episodes)
    print(f"{path}: {len(found.episodes)} episodes, {sum(len(e.frames) for e in found.episodes)} "
          f"frames, {known} with actions, fingerprint {found.fingerprint}: no defects")


if __name__ == "__main__":
    command, rest = sys.argv[1:2], sys.argv[2:]
    if command == ["tabletop"]:
        make_tabletop(parse_options(TabletopOptions, rest, positional=("out",),
                                    usage="data.py tabletop OUT [options]")[0])
    elif command == ["check"] and len(rest) == 1:
        check(rest[0])
    elif command in (["-h"], ["--help"]):
        print(__doc__.strip())
    else:
        fail("expected: data.py check DATASET, or data.py tabletop OUT [options]")
